"""The LM Evaluation Harness's own task definitions, located by name without parsing all of them.

The harness's index parses some 14,000 files in 18 s; the search for one `task:` line takes about one second.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.errors import EvaluationError
from portllm.suggestions import nearest
from portllm.world import datasets

_NAME = re.compile(rb"^[\"']?task[\"']?:[ \t]*[\"']?([^\s\"'#\[\]{}]+)[\"']?[ \t]*(?:#.*)?\r?$", re.MULTILINE)
_FIELD = r"^[\"']?{field}[\"']?:[ \t]*[\"']?([^\s\"'#]+)[\"']?"
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_CHAIN = 8  # the longest chain of included files in the harness is shorter


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A task in a list."""

    task: str
    output_type: str
    trainable: bool


def definition(name: str, others: Iterable[str] = ()) -> dict[str, Any]:
    """Return the harness's configuration of the task `name`, its includes and functions resolved.

    Raises EvaluationError; for an unknown name see `unknown`.
    """
    path = find(name)
    if path is None:
        raise unknown(name, others)
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(path)
    if "class" in config:
        raise EvaluationError(
            f"{name}: expected a task defined by a template, found one defined in code, which reads its own data"
        )
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    return config


def unknown(name: str, others: Iterable[str] = ()) -> EvaluationError:
    """Return the error for an unknown task, with the nearest name: of `others`, the world's or the harness's."""
    near = nearest(name, [*others, *datasets.TASKS]) or nearest(name, (one for one, _ in names()), cutoff=0.7)
    own = "for a group, pass its tasks one by one (`portllm tasks --all`); for your own data, pass --data DIR"
    hint = f"did you mean {near}?" if near else own
    return EvaluationError(f"{name}: no such task in the LM Evaluation Harness nor in the embedded world; {hint}")


@functools.cache
def find(name: str) -> Path | None:
    """Return the harness's file that defines the task `name`; None where there is none."""
    files = list(_files())
    # the folder or file of most tasks has their name
    files.sort(key=lambda path: not any(part and part in path.as_posix() for part in (name, name.partition("_")[0])))
    wanted = name.encode()
    return next((path for path in files if wanted in _NAME.findall(path.read_bytes())), None)


def names() -> Iterator[tuple[str, Path]]:
    """Yield every task of the harness with the file that defines it."""
    for path in _files():
        for found in _NAME.findall(path.read_bytes()):
            yield found.decode("utf-8", "replace"), path


def listing() -> list[Listed]:
    """Return every task of the harness, sorted by name, from its files; those defined in code have no fields there."""
    listed = []
    for name, path in names():
        kind = _field("output_type", path) or "generate_until"
        split = _field("training_split", path)
        listed.append(Listed(task=name, output_type=kind, trainable=split not in (None, "null", "~", "!!null")))
    return sorted(listed, key=lambda one: one.task)


def splits(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the splits that a definition names, by field."""
    named = {field: config[field] for field in SPLITS if config.get(field)}
    few = config.get("fewshot_config")
    if isinstance(few, Mapping) and few.get("split"):
        named["fewshot_split"] = str(few["split"])
    return named


def asked_split(config: Mapping[str, Any]) -> str:
    """Return the split that a task is evaluated on: test, else validation. Raises EvaluationError."""
    split = config.get("test_split") or config.get("validation_split")
    if not split:
        raise EvaluationError(f"{config.get('task')}: its definition names no test or validation split to evaluate on")
    return str(split)


def _field(field: str, path: Path, depth: int = 0) -> str | None:
    """Return a plain field of a task file, or of the file that it includes."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if found := re.search(_FIELD.format(field=field), text, re.MULTILINE):
        return found[1]
    included = re.search(_FIELD.format(field="include"), text, re.MULTILINE)
    if included is None or depth == _CHAIN or not (path.parent / included[1]).is_file():
        return None
    return _field(field, path.parent / included[1], depth + 1)


@functools.cache
def _files() -> tuple[Path, ...]:
    # the location of lm_eval, without importing it
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EvaluationError("the LM Evaluation Harness is not installed; install it with `pip install lm-eval[hf]`")
    root = Path(spec.submodule_search_locations[0]) / "tasks"
    return tuple(sorted(root.rglob("*.yaml"), key=lambda path: path.as_posix()))
