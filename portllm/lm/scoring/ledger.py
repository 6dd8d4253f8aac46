"""Scores of earlier evaluations, by content, in the user's cache directory: nothing is scored twice.

An entry stands under the digest of everything its figures depend on: checkpoint, patch, data, definition, code and
machine. It repeats all of that and holds a digest of its own; it is used only where the three agree and every value is
of the right type. None of it needs torch, transformers or the harness: a cached score costs a look into files only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import portllm
from portllm.checkpoint.files.hashing import file_digest, fingerprint, identity
from portllm.checkpoint.files.output import staged_file
from portllm.errors import OutputError
from portllm.lm.data import stock
from portllm.lm.scoring.scored import ScoredDocument, ScoredTask

FORMAT = 3
PACKAGES = ("accelerate", "datasets", "lm_eval", "numpy", "peft", "tokenizers", "torch", "transformers")
# tensors are in the fingerprint; other weights are never read; papers and our own records change no score
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
RECORDS = ("port.json", "patch.json", "release.json")
# signs that torch may find a GPU: NVIDIA's driver, Windows' under WSL, AMD's
DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
OWN_CODE = ("lm", "world")


# --- entries ---


def find(key: Mapping[str, Any]) -> ScoredTask | None:
    """Return the score under `key`; None where there is none, or what is there is damaged or another's."""
    try:
        tree = json.loads(_file(key).read_text(encoding="utf-8"))
        entry = tree["scored"]
        if tree["format"] != FORMAT or tree["key"] != json.loads(_plain(key)) or tree["digest"] != _digest(entry):
            return None
        scored = _read(entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None
    return scored if scored.task == key["task"] else None


def keep(key: Mapping[str, Any], scored: ScoredTask) -> None:
    """Write a score under `key`. Raises OutputError where the cache cannot be written, which costs time only."""
    entry = json.loads(json.dumps({**vars(scored), "documents": [vars(document) for document in scored.documents]}))
    text = json.dumps({"format": FORMAT, "key": key, "scored": entry, "digest": _digest(entry)}, ensure_ascii=False)
    try:
        with staged_file(_file(key)) as partial:
            partial.write_text(text, encoding="utf-8")
    except (OutputError, OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"the cache of scores cannot be written ({error})") from error


def _read(tree: Mapping[str, Any]) -> ScoredTask:
    """Raises KeyError, TypeError and ValueError for what is not of the right type."""
    documents = tuple(
        ScoredDocument(
            doc_id=_of(int, one["doc_id"]),
            score=_of(float, one["score"]),
            answer=_of(str, one["answer"]),
            target=_of(str, one["target"]),
            metrics={_of(str, k): _of(float, v) for k, v in one["metrics"].items()},
            answers={_of(str, k): _of(str, v) for k, v in one["answers"].items()},
            loglikelihoods=tuple(_of(float, value) for value in one["loglikelihoods"]),
            written=_of(str, one["written"]),
        )
        for one in tree["documents"]
    )
    return ScoredTask(
        task=_of(str, tree["task"]),
        split=_of(str, tree["split"]),
        metrics={_of(str, k): _of(float, v) for k, v in tree["metrics"].items()},
        documents=documents,
        truncated=_of(int, tree["truncated"]),
    )


def _of(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r:.60}")
    return value


def _file(key: Mapping[str, Any]) -> Path:
    """Raises RuntimeError for a user without a home directory."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    name = hashlib.sha256(_plain(key).encode()).hexdigest()
    return Path(root) / "portllm" / "scores" / name[:2] / f"{name}.json"


def _digest(entry: Any) -> str:
    return hashlib.sha256(_plain(entry).encode()).hexdigest()


def _plain(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


# --- what a score depends on ---


def weights_identity(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's or patch's fingerprint, and SHA-256 of every other file that loading it may read.

    Raises CheckpointError.
    """
    return {"fingerprint": fingerprint(folder), "files": files_identity(_read_on_loading(folder))}


def tokenizer_identity(folder: Path) -> dict[str, str]:
    """Return SHA-256 of a checkpoint's files other than weights and their configuration: what makes its tokenizer."""
    return files_identity(
        path for path in _read_on_loading(folder) if path.name not in ("config.json", "generation_config.json")
    )


def files_identity(paths: Iterable[Path]) -> dict[str, str]:
    """Return SHA-256 of files, by their names."""
    return {path.name: file_digest(path) for path in sorted(paths)}


@cache
def definition_identity(task: str) -> Mapping[str, str]:
    """Return SHA-256 of the harness's files that define `task`; nothing for a task it does not have."""
    file = stock.find(task)
    inside = (p for p in file.parent.iterdir() if p.suffix in (".yaml", ".py") or not p.suffix) if file else ()
    return files_identity(path for path in inside if path.is_file())


@cache
def code_identity() -> Mapping[str, str]:
    """Return versions of the libraries that compute a score, and one digest of our own code that does."""
    root = Path(portllm.__file__).parent
    total = hashlib.sha256()
    for path in sorted(p for part in OWN_CODE for p in (root / part).rglob("*") if p.suffix in (".py", ".yaml")):
        total.update(f"{path.relative_to(root).as_posix()} {file_digest(path)}\n".encode())
    return {"portllm": total.hexdigest(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


@cache
def device_identity() -> str:
    """Return what computes here: `cpu`, or the name of the GPU. Imports torch only where there may be one."""
    built_for_cpu = importlib.metadata.version("torch").endswith("+cpu")
    if built_for_cpu or (sys.platform == "linux" and not any(map(os.path.exists, DRIVERS))):
        return "cpu"
    import torch

    return f"cuda {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"


def folder_state(folder: Path) -> dict[str, list[int]]:
    """Return what distinguishes this state of the files in `folder` from any other, without reading them."""
    return {path.name: identity(path.stat()) for path in sorted(folder.glob("*"))}


def _read_on_loading(folder: Path) -> Iterable[Path]:
    for path in folder.iterdir():
        ignored = path.name.endswith(WEIGHTS) or path.name in RECORDS or path.suffix == ".md" or path.name[0] == "."
        if path.is_file() and not ignored:
            yield path
