"""The prompt and answer of a task's row, rendered from the YAML that the harness evaluates with.

Training and evaluation have one source, so that a patch is trained on the prompts it is evaluated with. The harness
itself is not imported: rendering needs only jinja2.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.errors import EvaluationError

_OWN, _WORLD = "portllm.lm.data.own", "portllm.world."


@dataclass(frozen=True)
class Prompts:
    """The prompts of one task, as the harness renders them."""

    config: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> Prompts:
        """Read the prompts of the task file at `path`. Raises EvaluationError."""
        return cls(load_task(path))

    def prompt(self, row: Mapping[str, Any]) -> str:
        """Return the model's input. Raises EvaluationError where the row lacks a column."""
        return self._render("doc_to_text", row)

    def answer(self, row: Mapping[str, Any]) -> str:
        """Return the expected continuation, delimiter included. Raises EvaluationError."""
        target = self._target(row)
        choices = self.choices(row)
        text = choices[int(target)] if choices and target.isdigit() else target
        return f"{self.config.get('target_delimiter', ' ')}{text}"

    def choices(self, row: Mapping[str, Any]) -> list[str]:
        """Return the answers to choose from; none for a task whose answer is generated."""
        choices = self.config.get("doc_to_choice")
        if isinstance(choices, str):
            choices = row[choices] if choices in row else ast.literal_eval(self._render("doc_to_choice", row))
        return [str(choice) for choice in choices or ()]

    def pairs(self, rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
        """Return (prompt, answer) of every row: the training pairs of a patch."""
        return [(self.prompt(row), self.answer(row)) for row in rows]

    def _target(self, row: Mapping[str, Any]) -> str:
        target = self.config.get("doc_to_target")
        if isinstance(target, str) and target in row:
            # a column's name means its value; True is choice 1
            return str(int(row[target]) if isinstance(row[target], bool) else row[target])
        return str(target) if isinstance(target, int) else self._render("doc_to_target", row)

    def _render(self, field: str, row: Mapping[str, Any]) -> str:
        from jinja2 import StrictUndefined, TemplateError
        from jinja2.sandbox import SandboxedEnvironment

        template = self.config.get(field)
        name = self.config.get("task", "task")
        if not isinstance(template, str):
            raise EvaluationError(f"{name}: {field} must be a template, found {template!r}; correct the task's YAML")
        if template in row:
            return str(row[template])
        # the harness's settings (a final newline is kept, a missing column is an error), in a sandbox
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
        try:
            return str(environment.from_string(template).render(**row))
        except TemplateError as error:
            raise EvaluationError(
                f"{name}: {field} does not fit the row ({error}); its columns are {', '.join(map(str, row))}"
            ) from error


def load_task(path: Path) -> dict[str, Any]:
    """Read a task file as the harness's dict, `!function portllm.…` resolved. Raises EvaluationError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """A safe loader with the one tag of the harness's task files."""

    Loader.add_constructor("!function", lambda _, node: _function(str(node.value), path))
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # noqa: S506 (a SafeLoader)
    except (OSError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise EvaluationError(f"{path}: not a readable task file ({text}); correct or replace it") from error
    if not isinstance(config, dict) or "task" not in config:
        raise EvaluationError(f"{path}: expected a task file with `task:`, found {type(config).__name__}; see --tasks")
    return config


def _function(name: str, path: Path) -> Any:
    module, _, attribute = name.rpartition(".")
    # task files refer to code: only functions of portllm that are meant for them are run
    if module != _OWN and not module.startswith(_WORLD):
        raise EvaluationError(f"{path}: !function {name} is not portllm's own; only portllm's functions are run")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise EvaluationError(f"{path}: !function {name} does not exist ({error}); correct the task file") from error
    if attribute.startswith("_") or getattr(found, "__module__", None) != module:
        raise EvaluationError(f"{path}: !function {name} is not a function for task files; correct the task file")
    return found
