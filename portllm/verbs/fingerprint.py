"""fingerprint: the identity of a checkpoint's or patch's tensors."""

from __future__ import annotations

from pathlib import Path

from portllm.checkpoint.files.hashing import fingerprint
from portllm.errors import CheckpointError


def run(*, path: Path) -> str:
    """Return the hex digest of the tensors in `path` (names, dtypes, shapes, bytes). Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint or patch directory, found none; check the path")
    return fingerprint(path)
