"""Checkpoints of a training under way: one safetensors file each, whole or not believed.

The file's name carries its step and the BLAKE3 of its bytes; it is written aside, synced and renamed. A file whose
bytes do not hash to its name (a damaged disk, a copy cut short) is passed over for the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm import processes
from portllm.checkpoint.files.hashing import file_digest, fingerprint, tensor_hash
from portllm.checkpoint.files.names import companions
from portllm.checkpoint.files.output import sync_directory
from portllm.checkpoint.record.provenance import versions
from portllm.checkpoint.record.records import dumps

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2  # the last and the one before, in case the last is damaged
PIECE_BYTES = 1 << 22
STATE = "state"
_NAME = re.compile(r"(?P<step>\d{9})-(?P<digest>[0-9a-f]{64})\.safetensors")


def training_key(base: Path | None, *inputs: Any) -> str:
    """What names a training: a snapshot is gone on with where base, inputs, libraries and processes are the same."""
    made_by = [versions("torch", "transformers", "peft", "accelerate"), processes.count()]
    files = {name: file_digest(path) for name, path in companions(base, base).items()} if base else {}
    made_from = [fingerprint(base) if base else None, files, *inputs]
    return hashlib.sha256(dumps([made_from, made_by]).encode()).hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """What a training was after `step`: tensors by name, and everything else as JSON can hold it."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Snapshots:
    """The snapshots in a folder; `note` is told of those that are passed over, or could not be written."""

    folder: Path
    note: Callable[[str], object] = lambda _: None

    def write(self, snapshot: Snapshot) -> None:
        """Keep `snapshot`, and of the earlier ones the last. A disk that refuses is told of; training need not end."""
        from safetensors import SafetensorError

        partial = self.folder / "partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(snapshot, partial)
            for path in self._files()[KEPT:]:
                path.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self.note(f"the checkpoint after step {snapshot.step} could not be written ({error}); training goes on")

    def _write(self, snapshot: Snapshot, partial: Path) -> None:
        from safetensors.torch import save_file

        save_file(dict(snapshot.tensors), partial, metadata={STATE: json.dumps(dict(snapshot.state))})
        digest = _digest(partial)
        handle = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        partial.rename(self.folder / f"{snapshot.step:09}-{digest}.safetensors")
        sync_directory(self.folder)

    def newest(self) -> Snapshot | None:
        """The last snapshot that is whole; None where there is none."""
        from safetensors import safe_open

        for path in self._files():
            named = _NAME.fullmatch(path.name)
            if named is None or _digest(path) != named["digest"]:
                self.note(f"the checkpoint after step {int(path.name[:9])} is damaged and is not used")
                continue
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()[STATE])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            return Snapshot(int(named["step"]), tensors, state)
        return None

    def _files(self) -> list[Path]:
        """Newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name)), reverse=True)


def _digest(path: Path) -> str:
    total = tensor_hash()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            total.update(piece)
    return str(total.hexdigest())
