"""The header of a safetensors file, parsed and validated without torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, then the data. The
JSON maps each name to dtype, shape and a byte range counted from the start of the data.
Format: safetensors' own README ("Format").
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.errors import CheckpointError, HeaderError

MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: dtype as safetensors spells it, byte range [start, stop) in the whole file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Length of the tensor's data in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A validated header: the tensors of `path` in the order their bytes stand."""

    path: Path
    data_start: int
    size: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of `path`. Raises CheckpointError when unreadable, HeaderError when it does not describe its file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _length(file.read(8), size, path)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    tree = _json(text, path)
    metadata = _metadata(tree.pop("__metadata__", {}), path)
    start = 8 + length
    entries = [_entry(name, value, start, path) for name, value in tree.items()]
    entries.sort(key=lambda e: (e.start, e.stop))
    _contiguous(entries, start, size, path)
    return Header(path, start, size, {e.name: e for e in entries}, metadata)


def _length(prefix: bytes, size: int, path: Path) -> int:
    if len(prefix) < 8:
        raise _bad(path, f"expected a safetensors file, found {size} bytes")
    length = int(struct.unpack("<Q", prefix)[0])
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise _bad(path, f"the header claims {length} bytes, expected at most {min(MAX_HEADER_BYTES, size - 8)}")
    return length


def _json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"the header is not valid JSON ({error})") from error
    if not isinstance(tree, dict):
        raise _bad(path, "the header is not a JSON object")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a name occurs twice")
    return tree


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _bad(path, "__metadata__ must map text to text")
    return value


def _entry(name: str, value: Any, start: int, path: Path) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _bad(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"tensor {name!r} has a malformed shape or byte range")
    expected = math.prod(shape) * BITS[dtype]
    if expected != 8 * (offsets[1] - offsets[0]):
        raise _bad(path, f"tensor {name!r} needs {expected // 8} bytes, its range holds {offsets[1] - offsets[0]}")
    return TensorEntry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _contiguous(entries: list[TensorEntry], start: int, size: int, path: Path) -> None:
    at = start
    for entry in entries:
        if entry.start != at:
            raise _bad(path, f"tensor {entry.name!r} starts at byte {entry.start}, expected {at} (gap or overlap)")
        at = entry.stop
    if at != size:
        raise _bad(path, f"the header describes {at} bytes, the file has {size} (cut short or added to)")


def _bad(path: Path, why: str) -> HeaderError:
    return HeaderError(f"{path}: {why}; fetch the file again")
