"""What a score depends on, as names and digests: checkpoint, patch, data, definition, code and machine.

None of it needs torch, transformers or the harness, so that a score that is known costs a look into files only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import portllm
from portllm.checkpoint.files.hashing import file_digest, fingerprint, identity
from portllm.lm.data import stock

PACKAGES = ("accelerate", "datasets", "lm_eval", "numpy", "peft", "tokenizers", "torch", "transformers")
# tensors are in the fingerprint; other weights are never read; papers and our own records say nothing to a model
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
RECORDS = ("port.json", "patch.json", "release.json")
# signs that torch may find a GPU: NVIDIA's driver, Windows' under WSL, AMD's
DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
OWN_CODE = ("lm", "world")


def of_weights(folder: Path) -> dict[str, Any]:
    """A checkpoint's or patch's tensors, and every other file that loading it may read. Raises CheckpointError."""
    return {"fingerprint": fingerprint(folder), "files": of_files(_said(folder))}


def of_words(folder: Path) -> dict[str, str]:
    """A checkpoint's files other than its weights and their configuration: what makes its tokenizer."""
    return of_files(path for path in _said(folder) if path.name not in ("config.json", "generation_config.json"))


def of_files(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of data files, by their names."""
    return {path.name: file_digest(path) for path in sorted(paths)}


@cache
def of_definition(task: str) -> Mapping[str, str]:
    """SHA-256 of the harness's files that define `task`; nothing for a task it does not know."""
    found = stock.find(task)
    inside = (p for p in found.parent.iterdir() if p.suffix in (".yaml", ".py") or not p.suffix) if found else ()
    return of_files(path for path in inside if path.is_file())


@cache
def of_code() -> Mapping[str, str]:
    """Versions of the libraries that compute a score, and one digest of our own code that does."""
    root = Path(portllm.__file__).parent
    total = hashlib.sha256()
    for path in sorted(p for part in OWN_CODE for p in (root / part).rglob("*") if p.suffix in (".py", ".yaml")):
        total.update(f"{path.relative_to(root).as_posix()} {file_digest(path)}\n".encode())
    return {"portllm": total.hexdigest(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


@cache
def of_device() -> str:
    """What computes here: `cpu`, or the name of the GPU. torch is asked only where there may be one."""
    built_for_cpu = importlib.metadata.version("torch").endswith("+cpu")
    if built_for_cpu or (sys.platform == "linux" and not any(map(os.path.exists, DRIVERS))):
        return "cpu"
    import torch

    return f"cuda {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"


def state(folder: Path) -> dict[str, list[int]]:
    """What tells the files in `folder` from what they were: any change shows, at the price of looking at each."""
    return {path.name: identity(path.stat()) for path in sorted(folder.glob("*"))}


def _said(folder: Path) -> Iterable[Path]:
    for path in folder.iterdir():
        told = path.name.endswith(WEIGHTS) or path.name in RECORDS or path.suffix == ".md" or path.name[0] == "."
        if path.is_file() and not told:
            yield path
