"""The header of a safetensors file, parsed and validated without torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, then the data. The
JSON maps each name to dtype, shape and a byte range counted from the start of the data.
Format: safetensors' own README ("Format").
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from portllm.errors import CheckpointError, HeaderError

MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
MAX_AXES = 64  # the limit of torch

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip

KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


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


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is read into a CheckpointError that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); check the path, its permissions and the disk"
        ) from error
    except ValueError as error:  # a NUL in the name
        raise CheckpointError(f"{path}: cannot be read ({error}); check the path") from error


def open_input(path: Path) -> BinaryIO:
    """`path` opened for reading, unbuffered; links are followed. Raises CheckpointError, also for what is no file.

    The kind is looked at first: opening a FIFO waits for a writer that never comes, and a device never ends.
    """
    with reading(path):
        mode = path.stat().st_mode
        for is_kind, kind in KINDS:
            if is_kind(mode):
                raise CheckpointError(f"{path}: cannot be read: expected a file, found {kind}; fetch it again")
        return path.open("rb", buffering=0)


def times(shape: tuple[int, ...]) -> str:
    """A shape for people: 64×32."""
    return "×".join(map(str, shape)) or "a scalar"


def read_header(path: Path) -> Header:
    """The header of `path`. Raises CheckpointError when unreadable, HeaderError when it does not describe its file."""
    with open_input(path) as file:
        with reading(path):
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
        length = _length(prefix, size, path)
        with reading(path):
            text = file.read(length)
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
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        "".join(tree).encode()  # JSON can spell half a character, which no file can hold
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"the header is not valid JSON ({error})") from error
    if not isinstance(tree, dict):
        raise _bad(path, "the header is not a JSON object")
    return tree


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError for a key that occurs twice, which JSON leaves open."""
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"{key} occurs twice")
        tree[key] = value
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
    if len(shape) > MAX_AXES or math.prod(n for n in shape if n) >= 2**63:
        raise _bad(path, f"tensor {name!r} has a shape of {len(shape)} axes that no memory holds")
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
