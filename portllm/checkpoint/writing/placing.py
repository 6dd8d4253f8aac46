"""Where the tensors of a written file stand: in their old places, or in a header of the file's own."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.base.checkpoint import read_exactly
from portllm.checkpoint.files.headers import Header, open_input
from portllm.checkpoint.writing.targets import Target, TargetFile

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit

# safetensors' own order of dtypes, the most strictly aligned first
DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip


def plain_file(shard: Header, path: Path, edits: Mapping[str, Callable[[], Edit]]) -> TargetFile:
    """`shard` written to `path` with some tensors edited, by name; header and places are kept byte for byte.

    Raises CheckpointError when the shard is not what its header says any more, OSError.
    """
    head = bytearray(shard.data_start)
    with open_input(shard.path) as file:
        read_exactly(file.fileno(), memoryview(head), 0, shard.path)
    targets = (Target(entry, (shard, entry), edits.get(name)) for name, entry in shard.tensors.items())
    return TargetFile(path, bytes(head), tuple(targets))


def laid_out(tensors: Iterable[Target], metadata: Mapping[str, str], path: Path) -> TargetFile:
    """A file with a header of its own for `tensors`; where their entries say they stand does not matter.

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
    placed, at = [], len(head)
    for target in ordered:
        stop = at + target.entry.nbytes
        placed.append(replace(target, entry=replace(target.entry, start=at, stop=stop)))
        at = stop
    return TargetFile(path, head, tuple(placed))


def nbytes(file: TargetFile) -> int:
    """Size of a file to be written."""
    return len(file.head) + sum(target.entry.nbytes for target in file.targets)
