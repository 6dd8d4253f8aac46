"""W + Δ, each sum rounded once to the weight's dtype, by numpy alone: what most ports are made of.

Importing torch takes ten times as long as porting a small model, so nothing here needs it; its tensors are taken, too.
As arrays, weights are float64, float32, float16, or uint16, which holds the bits of bfloat16. LoRA: arXiv:2106.09685.
Everywhere: a is A (r, in), b is B (out, r), Δ is scale · b @ a (out, in).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from portllm.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[Any]
    Matrix = NDArray[Any] | Tensor

BLOCK_ELEMENTS = 1 << 18  # fewer turns of the interpreter's lock, which cost more than the caches do

HUGE = 8 << 20  # numpy asks for huge pages from 4 MiB on
_OWN = threading.local()


class Update:
    """Δ prepared for being added block by block; B, which may be as tall as a vocabulary, is widened row by row."""

    def __init__(self, a: Matrix, b: Matrix, scale: float) -> None:
        """a (r, in) and b (out, r) in any floating dtype. Raises ShapeError."""
        check_factors(a, b)
        self._a, self._b, self._scale = a, b, scale

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of Δ."""
        return self._b.shape[0], self._a.shape[1]

    @cached_property
    def _wide_a(self) -> Array:
        return _wide(self._a)

    def add_rows(self, weight: Matrix, row: int, out: Matrix) -> float:
        """out = rows of W from `row` on, `weight` (rows, in), + Δ's same rows, rounded once to the weight's dtype.

        The sum is formed in float64. Returns its largest absolute value once rounded, or NaN where there is one.
        """
        import numpy

        old, new = as_array(weight), as_array(out)
        if old.size == 0:
            return 0.0
        b = _wide(self._b[row : row + len(old)]) * self._scale
        step = max(1, BLOCK_ELEMENTS // old.shape[1])
        ties = _Ties(new)
        with numpy.errstate(all="ignore"):  # what is not finite is told by the result
            for first in range(0, len(old), step):
                rows = slice(first, first + step)
                space = _space(old[rows].shape)
                space.widen(old[rows])
                space.total += numpy.matmul(b[rows], self._wide_a, out=space.delta)
                ties.note(space.narrow(new[rows]), space, first)
            ties.settle()
        return largest(new)

    def exact(self) -> Array:
        """Δ whole, in float64."""
        product: Array = (_wide(self._b) * self._scale) @ self._wide_a
        return product


@dataclass(frozen=True)
class Block:
    """An update and where in a tensor, seen as (rows, columns), its upper left corner stands."""

    update: Update
    row: int = 0
    column: int = 0


class AddLora:
    """The edit (`edits.Edit`) that adds updates to blocks of a tensor; what is in no block stays as it is."""

    surveys = False
    arrays = True

    def __init__(self, *blocks: Block) -> None:
        """Blocks of rows may straddle the writer's; no two may overlap. Raises ShapeError."""
        self._blocks = sorted(blocks, key=lambda block: (block.row, block.column))
        self._refuse_overlaps()

    def survey(self, old: Matrix, row: int, scratch: object) -> None:
        """Nothing to look for."""

    def rows(self, old: Matrix | None, row: int, out: Matrix, scratch: object = None) -> float:  # noqa: ARG002
        """Write old rows (count, columns) + Δ into `out`; see `Edit.rows` and `Update.add_rows`."""
        import numpy

        if old is None:
            raise ValueError("LoRA needs the old weight")
        old, out = as_array(old), as_array(out)
        found = list(self._within(row, *old.shape))
        if len(found) == 1 and found[0][1:] == (slice(0, old.shape[0]), slice(0, old.shape[1])):
            block = found[0][0]
            return block.update.add_rows(old, row - block.row, out)
        out[:] = old
        for block, rows, columns in found:
            weight = numpy.array(old[rows, columns], order="C")  # a copy
            block.update.add_rows(weight, row + rows.start - block.row, weight)
            out[rows, columns] = weight
        return largest(out)

    def exact(self, old: Tensor | None) -> Tensor:
        """The whole sum in float64, not rounded; see `Edit.exact`."""
        import torch

        if old is None:
            raise ValueError("LoRA needs the old weight")
        new = old.double().clone()
        for block in self._blocks:
            rows, columns = block.update.shape
            place = new[block.row : block.row + rows, block.column : block.column + columns]
            place += torch.from_numpy(block.update.exact())
        return new

    def _within(self, row: int, count: int, width: int) -> Iterator[tuple[Block, slice, slice]]:
        """The blocks that touch rows [row, row + count), and which of those rows and columns they cover."""
        for block in self._blocks:
            height, breadth = block.update.shape
            if block.column + breadth > width:
                raise ShapeError(f"update reaches column {block.column + breadth}, the tensor has {width}")
            first, last = max(block.row, row) - row, min(block.row + height, row + count) - row
            if first < last:
                yield block, slice(first, last), slice(block.column, block.column + breadth)

    def _refuse_overlaps(self) -> None:
        above: list[Block] = []
        for block in self._blocks:
            above = [other for other in above if other.row + other.update.shape[0] > block.row]
            for other in above:
                if (
                    block.column < other.column + other.update.shape[1]
                    and other.column < block.column + block.update.shape[1]
                ):
                    raise ShapeError(
                        f"two updates of one tensor overlap at row {block.row}, column "
                        f"{max(block.column, other.column)}; expected one update of each weight"
                    )
            above.append(block)


def check_factors(a: Matrix, b: Matrix) -> None:
    """Raise ShapeError where a and b are not (r, in) and (out, r)."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ShapeError(f"lora_A is {tuple(a.shape)} and lora_B is {tuple(b.shape)}, expected (r, in) and (out, r)")


def as_array(values: Matrix) -> Array:
    """`values` itself, or the memory of a tensor as an array; bfloat16 as uint16."""
    import numpy

    if isinstance(values, numpy.ndarray):
        return values
    import torch

    tensor = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    array: Array = tensor.numpy()
    return array.view(numpy.uint16) if values.dtype == torch.bfloat16 else array


def largest(values: Array) -> float:
    """Largest absolute value, NaN where there is one."""
    import numpy

    if values.size == 0:
        return 0.0
    if values.dtype.itemsize > 2:
        low, high = float(values.min()), float(values.max())
        return max(-low, high) if low == low else low
    # as numbers their bits are in the order of magnitude, first those of + and then those of -
    bits = max(int(values.view(numpy.int16).max()), int(values.view(numpy.uint16).max()) - 0x8000)
    if values.dtype == numpy.float16:
        return float(numpy.array(bits, numpy.uint16).view(numpy.float16))
    return float(numpy.array(bits << 16, numpy.uint32).view(numpy.float32))


def _wide(factor: Matrix) -> Array:
    import numpy

    if not isinstance(factor, numpy.ndarray):
        factor = factor.double().numpy()
    wide: Array = numpy.ascontiguousarray(factor, numpy.float64)
    return wide


class _Space:
    """Work space for a block (rows, columns), and what is done in it; a thread's all lie in the same memory."""

    def __init__(self, shape: tuple[int, int], memory: dict[str, Array]) -> None:
        import numpy

        self.shape, count = shape, shape[0] * shape[1]
        self.total, self.delta = (memory[name][:count].reshape(shape) for name in ("total", "delta"))
        self._flat = memory["bits"][:count]
        self._bits = self._flat.reshape(shape)
        self._near = self._bits.view(numpy.float32)
        self._halves, self._mask = self._flat.view(numpy.int16), memory["mask"][: 2 * count]
        self._fours = self._mask[: 2 * (count // 4 * 4)].view(numpy.int64)

    def widen(self, old: Array) -> None:
        """Write weights into `total`."""
        import numpy

        if old.dtype == numpy.uint16:
            numpy.copyto(self._bits, old)
            numpy.left_shift(self._bits, 16, out=self._bits)
            old = self._near
        numpy.copyto(self.total, old)

    def narrow(self, out: Array) -> Array:
        """Round `total` to the dtype of `out`, to the nearest; returns the flat indices that are still to be rounded.

        numpy rounds to float16 in one step, ties to even. Every tie of bfloat16 is a float32: where the float32 is
        none, it lies on the same side of the nearest one as the float64 does, and adding half a unit rounds it.
        """
        import numpy

        if out.dtype != numpy.uint16:
            numpy.copyto(out, self.total, casting="same_kind")
            return numpy.empty(0, numpy.intp)
        numpy.copyto(self._near, self.total, casting="same_kind")
        found = self._ties()
        # cannot overflow: the lower half of infinity and of a bfloat16's NaN is 0
        numpy.add(self._bits, numpy.uint32(0x8000), out=self._bits)
        numpy.right_shift(self._bits, 16, out=self._bits)
        numpy.copyto(out, self._bits, casting="same_kind")
        return found

    def _ties(self) -> Array:
        """Flat indices of all float32 values half-way between two of bfloat16, and of some that are not."""
        import numpy

        numpy.equal(self._halves, -0x8000, out=self._mask)  # the lower half; the upper one only of -0 and the like
        # four numbers in eight bytes of the mask at once; numpy searches for a bool faster than for a number
        found = numpy.flatnonzero(self._fours != 0)
        if len(found):
            found = (4 * found[:, None] + numpy.arange(4)).ravel()
        count, whole = len(self._flat), 4 * len(self._fours)
        return numpy.append(found, numpy.arange(whole, count)) if whole < count else found


class _Ties:
    """The few sums that are not rounded with the others, kept until all blocks are through."""

    def __init__(self, out: Array) -> None:
        self._out = out
        self._found: list[Array] = []
        self._values: list[Array] = []

    def note(self, found: Array, space: _Space, row: int) -> None:
        """Keep the sums at flat indices `found` of a block whose first row is `row`."""
        if len(found):
            self._values.append(space.total.reshape(-1)[found])
            self._found.append(found + row * space.shape[1])

    def settle(self) -> None:
        """Round them."""
        import numpy

        if self._found:
            i, j = numpy.divmod(numpy.concatenate(self._found), self._out.shape[1])
            self._out[i, j] = _round_odd(numpy.concatenate(self._values))


def _round_odd(values: Array) -> Array:
    """float64 to bfloat16 by way of float32, rounded to odd on the way, which makes the second rounding right.

    The last bit is set when anything was lost: Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008.
    """
    import numpy

    near = values.astype(numpy.float32)
    back = near.astype(numpy.float64)
    bits = near.view(numpy.uint32)
    bits -= numpy.abs(back) > numpy.abs(values)  # towards zero: sign and magnitude are separate bits
    bits |= back != values
    bits += numpy.uint32(0x7FFF) + (bits >> 16 & 1)
    return (bits >> 16).astype(numpy.uint16)


def _space(shape: tuple[int, int]) -> _Space:
    """This thread's work space of that shape, uninitialised: no block pays for fresh memory."""
    import numpy

    kept: dict[tuple[int, int], _Space] = _OWN.__dict__.setdefault("spaces", {})
    if shape not in kept:
        memory: dict[str, Array] = _OWN.__dict__.setdefault("memory", {})
        count = max(shape[0] * shape[1], BLOCK_ELEMENTS)
        if not memory or len(memory["bits"]) < count:
            kept.clear()
            whole = numpy.empty(max(22 * count, HUGE), "u1")
            at = 0
            for name, dtype, each in (("total", "f8", 8), ("delta", "f8", 8), ("bits", "u4", 4), ("mask", "?", 2)):
                memory[name] = whole[at : at + each * count].view(dtype)
                at += each * count
        kept[shape] = _Space(shape, memory)
    return kept[shape]
