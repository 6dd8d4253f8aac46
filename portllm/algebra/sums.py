"""W + Δ, each sum rounded once to the weight's dtype, without torch: the arithmetic of most ports.

Importing torch takes ten times as long as porting a small model, so nothing here needs it; its tensors are accepted.
Arrays of weights are float64, float32, float16, or uint16 with the bits of bfloat16. LoRA: arXiv:2106.09685.
In this file a is A (r, in), b is B (out, r), Δ is scale · b @ a (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from portllm.algebra import kernel, passes, rounding
from portllm.algebra.rounding import RowFactors
from portllm.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[Any]
    Matrix = NDArray[Any] | Tensor


class Update:
    """Δ prepared for addition in blocks; B, which may have as many rows as a vocabulary, is widened block by block."""

    def __init__(self, a: Matrix, b: Matrix, scale: float) -> None:
        """Take a (r, in) and b (out, r) in any floating dtype. Raises ShapeError."""
        check_factors(a, b)
        self._a, self._b, self._scale = a, b, scale

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of Δ."""
        return self._b.shape[0], self._a.shape[1]

    @cached_property
    def _wide_a(self) -> Array:
        return _wide(self._a)

    @cached_property
    def _norms(self) -> Array:
        """Upper bounds (in,) of the norms of A's columns, in float64."""
        return rounding.norms(_array(self._a), axis=0)

    @cached_property
    def _panels(self) -> kernel.Panels | None:
        return kernel.panels(_array(self._a), self._norms)

    def add_rows(self, weight: Matrix, row: int, out: Matrix) -> float:
        """Write `weight` (rows, in), the rows of W from `row` on, + the same rows of Δ to `out`, in the weight's dtype.

        Each written value is the exact sum of W and the products of A with scale · B (in float64), rounded once. It is
        the float64 sum where the terms are not finite, and for float64 weights. Returns the largest absolute value
        after rounding, or NaN where a value is NaN.
        """
        import numpy

        old, new = as_array(weight), as_array(out)
        if old.size == 0:
            return 0.0
        if numpy.may_share_memory(old, new):
            old = old.copy()
        with numpy.errstate(all="ignore"):  # the result reports values that are not finite
            b = _wide(self._b[row : row + len(old)]) * self._scale
            size = self._add(old, new, b)
            if size != size and new.dtype.itemsize < 8:
                _one_nan(new)
        return size

    def _add(self, old: Array, new: Array, b: Array) -> float:
        import numpy

        norms = rounding.norms(b, axis=1)
        bounded = norms.max() * self._norms.max() < rounding.LARGE  # neither is NaN
        reach = norms * (bounded * (len(self._a) + 3) * 1.01 * rounding.UNIT) if bounded else numpy.zeros(len(b))
        if bounded and kernel.level() is not None and kernel.suits(old, new) and self._panels is not None:
            result = kernel.add(old, new, self._panels, b, norms, reach)
            if result is not None:
                size, rest = result
                if len(rest):
                    RowFactors(b, self._wide_a, reach, self._norms).settle(old, new, rest)
                    return largest(new)
                return _number(size, old.dtype)
        passes.add(old, new, RowFactors(b, self._wide_a, reach, self._norms))
        return largest(new)

    def exact(self) -> Array:
        """Return the complete Δ (out, in) in float64."""
        product: Array = (_wide(self._b) * self._scale) @ self._wide_a
        return product


@dataclass(frozen=True)
class PlacedUpdate:
    """An update and the row and column of its upper left corner in a tensor viewed as (rows, columns)."""

    update: Update
    row: int = 0
    column: int = 0


class AddLora:
    """The edit (`edits.Edit`) that adds updates to blocks of a tensor; weights outside the blocks do not change."""

    surveys = False
    arrays = True

    def __init__(self, *blocks: PlacedUpdate) -> None:
        """Take the blocks. One may begin or end within a block of the writer; no two may overlap. Raises ShapeError."""
        self._blocks = sorted(blocks, key=lambda block: (block.row, block.column))
        self._refuse_overlaps()

    def survey(self, old: Matrix, row: int, scratch: object) -> None:
        """Do nothing: `rows` needs no earlier pass over the tensor."""

    def rows(self, old: Matrix | None, row: int, out: Matrix, scratch: object = None) -> float:  # noqa: ARG002
        """Write old rows (count, columns) + Δ into `out`; see `Edit.rows` and `Update.add_rows`."""

        if old is None:
            raise ValueError("LoRA needs the old weight")
        old, out = as_array(old), as_array(out)
        overlaps = list(self._within(row, *old.shape))
        if len(overlaps) == 1 and overlaps[0][1:] == (slice(0, old.shape[0]), slice(0, old.shape[1])):
            block = overlaps[0][0]
            return block.update.add_rows(old, row - block.row, out)
        out[:] = old
        for block, rows, columns in overlaps:
            block.update.add_rows(old[rows, columns], row + rows.start - block.row, out[rows, columns])
        return largest(out)

    def exact(self, old: Tensor | None) -> Tensor:
        """Return the complete sum in float64, not rounded; see `Edit.exact`."""
        import torch

        if old is None:
            raise ValueError("LoRA needs the old weight")
        new = old.double().clone()
        for block in self._blocks:
            rows, columns = block.update.shape
            place = new[block.row : block.row + rows, block.column : block.column + columns]
            place += torch.from_numpy(block.update.exact())
        return new

    def _within(self, row: int, count: int, width: int) -> Iterator[tuple[PlacedUpdate, slice, slice]]:
        """Yield each block that overlaps rows [row, row + count), with the slices of rows and columns it covers."""
        for block in self._blocks:
            height, breadth = block.update.shape
            if block.column + breadth > width:
                raise ShapeError(f"update reaches column {block.column + breadth}, the tensor has {width}")
            first, last = max(block.row, row) - row, min(block.row + height, row + count) - row
            if first < last:
                yield block, slice(first, last), slice(block.column, block.column + breadth)

    def _refuse_overlaps(self) -> None:
        above: list[PlacedUpdate] = []
        for block in self._blocks:
            above = [earlier for earlier in above if earlier.row + earlier.update.shape[0] > block.row]
            for earlier in above:
                if (
                    block.column < earlier.column + earlier.update.shape[1]
                    and earlier.column < block.column + block.update.shape[1]
                ):
                    raise ShapeError(
                        f"two updates of one tensor overlap at row {block.row}, column "
                        f"{max(block.column, earlier.column)}; expected one update of each weight"
                    )
            above.append(block)


def check_factors(a: Matrix, b: Matrix) -> None:
    """Raise ShapeError where a and b are not (r, in) and (out, r)."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ShapeError(f"lora_A is {tuple(a.shape)} and lora_B is {tuple(b.shape)}, expected (r, in) and (out, r)")


def as_array(values: Matrix) -> Array:
    """Return `values` itself, or an array on the memory of a tensor; bfloat16 as uint16."""
    import numpy

    if isinstance(values, numpy.ndarray):
        return values
    import torch

    tensor = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    array: Array = tensor.numpy()
    return array.view(numpy.uint16) if values.dtype == torch.bfloat16 else array


def largest(values: Array) -> float:
    """Return the largest absolute value, or NaN where a value is NaN."""
    import numpy

    if values.size == 0:
        return 0.0
    if values.dtype.itemsize > 2:
        low, high = float(values.min()), float(values.max())
        return max(-low, high) if low == low else low
    # read as unsigned integers the bits are in order of magnitude, first of positive and then of negative values
    return _number(
        max(int(values.view(numpy.int16).max()), int(values.view(numpy.uint16).max()) - 0x8000), values.dtype
    )


def _number(bits: int, dtype: Any) -> float:
    """Return the value that `bits` are in a dtype of 16 or 32 bits."""
    import numpy

    if dtype == numpy.float16:
        return float(numpy.array(bits, numpy.uint16).view(numpy.float16))
    return float(numpy.array(bits << 16 if dtype == numpy.uint16 else bits, numpy.uint32).view(numpy.float32))


def _one_nan(values: Array) -> None:
    """Set every NaN to the same bits."""
    import numpy

    if values.dtype == numpy.uint16:
        values[(values & 0x7FFF) > 0x7F80] = 0x7FC0
    else:
        values[numpy.isnan(values)] = numpy.nan


def _array(factor: Matrix) -> Array:
    """Return a factor as an array of float16, float32 or float64."""
    import numpy

    return factor if isinstance(factor, numpy.ndarray) else factor.double().numpy()


def _wide(factor: Matrix) -> Array:
    import numpy

    wide: Array = numpy.ascontiguousarray(_array(factor), numpy.float64)
    return wide
