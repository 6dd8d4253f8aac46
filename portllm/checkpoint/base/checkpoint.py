"""A checkpoint directory, read one tensor at a time: config.json and safetensors, single or sharded.

Nothing is loaded but what is asked for; torch is imported only by `read`.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.files.headers import (
    MAX_HEADER_BYTES,
    Header,
    TensorEntry,
    open_input,
    read_header,
    reading,
    unique,
)
from portllm.errors import CheckpointError, PatchError, UnsafeFileError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

BLOCK_ELEMENTS = 1 << 18

TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
ARRAY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: its bits


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model directory. `shards` are its safetensors headers, sorted by file name."""

    path: Path
    config: Mapping[str, Any]
    shards: tuple[Header, ...]
    where: Mapping[str, Header]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config and headers. Raises CheckpointError, UnsafeFileError or HeaderError; reads no tensor data."""
        with reading(path):
            if not path.is_dir():
                raise CheckpointError(f"{path}: expected a model directory, found {_kind(path)}; check the path")
        config = read_json_object(path / "config.json")
        if not isinstance(config.get("model_type"), str | None):
            raise CheckpointError(f"{path / 'config.json'}: model_type must be text; fetch the file again")
        shards = tuple(read_header(path / name) for name in shard_names(path))
        where: dict[str, Header] = {}
        for shard in shards:
            for name in shard.tensors:
                if name in where:
                    raise CheckpointError(f"{path}: tensor {name} is in two shards; fetch the checkpoint again")
                where[name] = shard
        _check_index(path, where)
        return cls(path, config, shards, where)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self.where))

    def entry(self, name: str) -> TensorEntry:
        """Header entry of a tensor. Raises CheckpointError when there is none."""
        if name not in self.where:
            raise CheckpointError(f"{self.path}: has no tensor {name}; see its names with portllm fingerprint -v")
        return self.where[name].tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises CheckpointError."""
        return self.entry(name).shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors spells it (F32, BF16, F16, …). Raises CheckpointError."""
        return self.entry(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its own dtype. Raises CheckpointError."""
        entry = self.entry(name)
        return read_tensor(self.where[name].path, entry)

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.size for shard in self.shards)


def read_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """One tensor of a safetensors file, in its own dtype. Raises CheckpointError."""
    import torch

    if entry.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {entry.name} has dtype {entry.dtype}, which portllm does not compute with"
        )
    dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    buffer = bytearray(entry.nbytes)
    with open_input(path) as file:
        read_exactly(file.fileno(), memoryview(buffer), entry.start, path)
    return torch.frombuffer(buffer, dtype=dtype).reshape(entry.shape)


def read_array(path: Path, entry: TensorEntry) -> NDArray[Any]:
    """One floating-point tensor of a safetensors file as an array; bfloat16 as float32. Raises CheckpointError."""
    import numpy

    if entry.dtype not in ARRAY_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {entry.name} has dtype {entry.dtype}, which portllm does not compute with"
        )
    buffer = bytearray(entry.nbytes)
    with open_input(path) as file:
        read_exactly(file.fileno(), memoryview(buffer), entry.start, path)
    array = numpy.frombuffer(buffer, ARRAY_DTYPES[entry.dtype]).reshape(entry.shape)
    return (array.astype(numpy.uint32) << 16).view(numpy.float32) if entry.dtype == "BF16" else array


def check_finite(path: Path, entry: TensorEntry) -> None:
    """Raise PatchError when a tensor holds NaN or infinity; read in blocks."""
    import numpy

    total = math.prod(entry.shape)
    for at in range(0, total, BLOCK_ELEMENTS):
        if not numpy.isfinite(read_array(path, _span(entry, at, min(at + BLOCK_ELEMENTS, total)))).all():
            raise PatchError(
                f"{path}: tensor {entry.name} holds NaN or infinity; expected finite values, train the patch again"
            )


def read_rows(path: Path, entry: TensorEntry, row: int, count: int) -> torch.Tensor:
    """Rows [row, row + count) of a tensor seen as (rows, columns), a vector as one row; all where count is −1."""
    rows, columns = (math.prod(entry.shape[:-1]), entry.shape[-1]) if entry.shape else (1, 1)
    stop = rows if count < 0 else row + count
    return _elements(path, entry, (row * columns, stop * columns)).view(stop - row, columns)


def equal_values(one: tuple[Path, TensorEntry], other: tuple[Path, TensorEntry]) -> bool:
    """Whether two tensors on disk hold the same numbers, whatever their dtypes; read in blocks."""
    import torch

    if one[1].shape != other[1].shape:
        return False
    total = math.prod(one[1].shape)
    for at in range(0, total, BLOCK_ELEMENTS):
        span = (at, min(at + BLOCK_ELEMENTS, total))
        left, right = (_elements(path, entry, span).double() for path, entry in (one, other))
        if not torch.equal(left, right):
            return False
    return True


def _elements(path: Path, entry: TensorEntry, span: tuple[int, int]) -> torch.Tensor:
    """Elements [first, last) of a tensor, flat."""
    return read_tensor(path, _span(entry, *span))


def _span(entry: TensorEntry, first: int, last: int) -> TensorEntry:
    """Elements [first, last) of a tensor as an entry of their own."""
    width = entry.nbytes // max(1, math.prod(entry.shape))
    return TensorEntry(
        entry.name, entry.dtype, (last - first,), entry.start + first * width, entry.start + last * width
    )


def read_exactly(handle: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from byte `offset` of the file. Raises CheckpointError where it ends first or the disk fails."""
    done = 0
    while done < len(buffer):
        with reading(path):
            count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{path}: became shorter while it was read; leave inputs alone and try again")
        done += count


def shard_names(path: Path) -> list[str]:
    """File names of the safetensors that make up the checkpoint, sorted. Raises CheckpointError, UnsafeFileError."""
    with reading(path):
        single, index = (path / SINGLE).is_file(), (path / INDEX).is_file()
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if single and index and set(_weight_map(path).values()) != {SINGLE}:
        raise CheckpointError(
            f"{path}: has both {SINGLE} and {INDEX}, which contradict each other; remove the stale one"
        )
    if single:
        return [SINGLE]
    if index:
        return sorted(set(_weight_map(path).values()))
    if pickles:
        code = (
            "import sys; from transformers import AutoModelForCausalLM as M; "
            "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])"
        )
        command = shlex.join(["python", "-c", code, str(path), "NEW_DIR"])
        raise UnsafeFileError(f"{path / pickles[0]}: is a pickle file, expected {SINGLE}; convert it with: {command}")
    raise CheckpointError(f"{path}: has neither {SINGLE} nor {INDEX}; is this a model directory?")


def read_json_object(path: Path, *, once: bool = False) -> dict[str, Any]:
    """A JSON file holding an object; `once` refuses a key that occurs twice. Raises CheckpointError."""
    try:
        exists = path.exists()
    except (OSError, ValueError):
        exists = True  # what is wrong with it, opening it will tell
    if not exists:
        raise CheckpointError(f"{path.parent}: has no {path.name}; is this the right directory?")
    with open_input(path) as file, reading(path):
        text = file.read(MAX_HEADER_BYTES + 1)
    try:
        if len(text) > MAX_HEADER_BYTES:
            raise ValueError(f"more than {MAX_HEADER_BYTES} bytes")
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=unique if once else None)
        json.dumps(tree, ensure_ascii=False).encode()  # JSON can spell half a character, which no file can hold
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); fetch the file again") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(tree).__name__}; fetch the file again")
    return tree


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path / INDEX, once=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path / INDEX}: weight_map must map tensor names to file names; fetch the file again")
    if not weight_map:
        raise CheckpointError(f"{path / INDEX}: weight_map is empty; fetch the file again")
    for name in set(weight_map.values()):
        if name != Path(name).name or name in (".", "..") or "\0" in name or not name.endswith(".safetensors"):
            raise UnsafeFileError(
                f"{path / INDEX}: names the file {name!r}, expected a safetensors file beside it; do not trust it"
            )
    return weight_map


def _check_index(path: Path, where: Mapping[str, Header]) -> None:
    if not (path / INDEX).is_file():
        return
    weight_map = _weight_map(path)
    for name, file in weight_map.items():
        if name not in where or where[name].path.name != file:
            raise CheckpointError(f"{path / INDEX}: tensor {name} is not in {file}; fetch the checkpoint again")
    if extra := sorted(set(where) - set(weight_map)):
        raise CheckpointError(
            f"{path / INDEX}: does not name {extra[0]}, which its shards hold; fetch the checkpoint again"
        )


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "nothing"
