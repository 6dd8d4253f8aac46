"""The safetensors files to write: tensor by tensor, where its bytes come from, how they change, where they go."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.base.base import Base
from portllm.checkpoint.files.headers import Header
from portllm.checkpoint.files.reading import open_input, read_exactly
from portllm.checkpoint.files.tensors import BITS, TensorEntry, TensorFile
from portllm.checkpoint.planning.changes import Change, Plan

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit

# safetensors' own order of dtypes, the most strictly aligned first
DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One tensor of a written file.

    `entry` names it and gives its place. `origin` is the base's tensor that is read with it, of the same dtype and
    shape, None where the edit makes the tensor from the patch alone. Without `edit` the origin's bytes are copied.
    `edit()` reads the patch's factors, so it is called late, once.
    """

    entry: TensorEntry
    origin: TensorEntry | None
    edit: Callable[[], Edit] | None = None


@dataclass(frozen=True)
class TargetFile:
    """One written file: its first bytes (length and header), then its tensors in this order, without gaps."""

    path: Path
    head: bytes
    targets: tuple[Target, ...]

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.head) + sum(target.entry.nbytes for target in self.targets)


def target_files(plan: Plan, base: Base, folder: Path) -> list[TargetFile]:
    """Return the files to write into `folder`: the base's own, with a new layout only where a tensor was added or grew.

    Raises CheckpointError when a shard is no longer what its header describes.
    """
    added: dict[Path, list[Change]] = {}
    shards = base.checkpoint.shards
    for name, change in plan.changes.items():
        if name not in base.tensors:
            home = shards[-1] if change.origin is None else base.tensors[change.origin]
            added.setdefault(home.path, []).append(change)
    return [_target_file(plan, base, shard, folder / shard.path.name, added.get(shard.path, [])) for shard in shards]


def _target_file(plan: Plan, base: Base, shard: Header, path: Path, added: list[Change]) -> TargetFile:
    own = {name: plan.changes[name] for name in shard.tensors if name in plan.changes}
    moved = any(change.shape != shard.tensors[n].shape or change.origin != n for n, change in own.items())
    if not added and not moved:
        return plain_file(shard, path, {name: change.edit for name, change in own.items() if change.edit})
    kept = [Target(entry, entry) for name, entry in shard.tensors.items() if name not in own]
    new = [_target(change, base) for change in (*own.values(), *added)]
    return laid_out([*kept, *new], shard.metadata, path)


def _target(change: Change, base: Base) -> Target:
    origin = base.tensors[change.origin] if change.origin is not None else None
    return Target(new_entry(change.name, change.dtype, change.shape), origin, change.edit)


def new_entry(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    """Return the entry of a tensor to be written; `laid_out` gives it its place."""
    length = math.prod(shape) * BITS[dtype] // 8
    return TensorEntry(name, dtype, shape, 0, length, TensorFile(Path(), 0, 0))


def plain_file(shard: Header, path: Path, edits: Mapping[str, Callable[[], Edit]]) -> TargetFile:
    """Return `shard` written to `path` with some tensors edited, by name; header and places are kept byte for byte.

    Raises CheckpointError when the shard is no longer what its header describes, OSError.
    """
    head = bytearray(shard.data_start)
    with open_input(shard.path) as file:
        read_exactly(file.fileno(), memoryview(head), 0, shard.path)
    place = TensorFile(path, shard.data_start, shard.size)
    targets = (Target(replace(e, file=place), e, edits.get(name)) for name, e in shard.tensors.items())
    return TargetFile(path, bytes(head), tuple(targets))


def laid_out(tensors: Iterable[Target], metadata: Mapping[str, str], path: Path) -> TargetFile:
    """Return a file with a header of its own for `tensors`, whose entries' places do not matter.

    Ordered by alignment, then name, and padded, as safetensors does; metadata sorted. The same input, the same bytes.
    """
    ordered = sorted(tensors, key=lambda t: (DTYPE_ORDER.index(t.entry.dtype), t.entry.name))
    tree: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for entry in (target.entry for target in ordered):
        offsets = [at, at + entry.nbytes]
        tree[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.nbytes
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # safetensors keeps the data aligned
    head = struct.pack("<Q", len(text)) + text
    file = TensorFile(path, len(head), len(head) + at)
    placed, at = [], len(head)
    for target in ordered:
        stop = at + target.entry.nbytes
        placed.append(replace(target, entry=replace(target.entry, start=at, stop=stop, file=file)))
        at = stop
    return TargetFile(path, head, tuple(placed))
