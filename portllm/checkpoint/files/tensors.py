"""A tensor in a safetensors file: where its bytes are, and its values, read only when a method is called.

torch is imported only by the methods that return its tensors; `array` needs numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.files.reading import open_input, read_exactly
from portllm.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
ARRAY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: its bits
BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file as its header was read: where its data starts and its size, in bytes."""

    path: Path
    data_start: int
    size: int


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: dtype as safetensors spells it, byte range [start, stop) in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    file: TensorFile

    @property
    def path(self) -> Path:
        """Return the path of its file."""
        return self.file.path

    @property
    def nbytes(self) -> int:
        """Return the length of the tensor's data in bytes."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """Return the number of its elements."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Return the length of the last axis: a tensor is seen as (rows, columns), a vector as one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def width(self) -> int:
        """Return the length of one element in bytes; the dtype has whole bytes."""
        return BITS[self.dtype] // 8

    @property
    def row_bytes(self) -> int:
        """Return the length of one row in bytes, at least 1."""
        return max(1, self.columns * self.width)

    def span(self, first: int, last: int) -> TensorEntry:
        """Return elements [first, last) as an entry of their own, a vector."""
        width = self.nbytes // max(1, self.elements)
        return replace(self, shape=(last - first,), start=self.start + first * width, stop=self.start + last * width)

    def first_rows(self, count: int) -> TensorEntry:
        """Return the first `count` rows of a matrix as an entry of their own."""
        length = self.nbytes // max(1, self.shape[0])
        return replace(self, shape=(count, *self.shape[1:]), stop=self.start + count * length)

    def blocks(self) -> Iterator[TensorEntry]:
        """Yield the tensor as consecutive vectors of at most BLOCK_ELEMENTS elements."""
        for first in range(0, self.elements, BLOCK_ELEMENTS):
            yield self.span(first, min(first + BLOCK_ELEMENTS, self.elements))

    def read(self) -> torch.Tensor:
        """Return the tensor on the CPU, in its own dtype. Raises CheckpointError."""
        import torch

        dtype = getattr(torch, self._known(TORCH_DTYPES))
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self._bytes(), dtype=dtype).reshape(self.shape)

    def array(self) -> NDArray[Any]:
        """Return the tensor, of a floating dtype, as an array; bfloat16 as float32. Raises CheckpointError."""
        import numpy

        array = numpy.frombuffer(self._bytes(), self._known(ARRAY_DTYPES)).reshape(self.shape)
        return (array.astype(numpy.uint32) << 16).view(numpy.float32) if self.dtype == "BF16" else array

    def rows(self, row: int, count: int) -> torch.Tensor:
        """Return rows [row, row + count) of the tensor seen as (rows, columns); all rows where count is −1."""
        rows = math.prod(self.shape[:-1]) if self.shape else 1
        stop = rows if count < 0 else row + count
        return self.span(row * self.columns, stop * self.columns).read().view(stop - row, self.columns)

    def is_finite(self) -> bool:
        """Return whether a tensor of a floating dtype holds neither NaN nor infinity; read in blocks."""
        import numpy

        return all(bool(numpy.isfinite(block.array()).all()) for block in self.blocks())

    def equals(self, other: TensorEntry) -> bool:
        """Return whether both hold the same numbers, whatever their dtypes; read in blocks."""
        import torch

        if self.shape != other.shape:
            return False
        pairs = zip(self.blocks(), other.blocks(), strict=True)
        return all(torch.equal(one.read().double(), two.read().double()) for one, two in pairs)

    def _bytes(self) -> bytearray:
        buffer = bytearray(self.nbytes)
        with open_input(self.path) as file:
            read_exactly(file.fileno(), memoryview(buffer), self.start, self.path)
        return buffer

    def _known(self, dtypes: dict[str, str]) -> str:
        if self.dtype not in dtypes:
            raise CheckpointError(
                f"{self.path}: tensor {self.name} has dtype {self.dtype}, which portllm does not compute with"
            )
        return dtypes[self.dtype]


def times(shape: tuple[int, ...]) -> str:
    """Return a shape for people: 64×32."""
    return "×".join(map(str, shape)) or "a scalar"
