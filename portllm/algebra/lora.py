"""LoRA's weight update Δ = scale · B A, added to weights with one rounding, and what is known of it without forming it.

LoRA: arXiv:2106.09685. Everywhere: a is A (r, in), b is B (out, r), Δ is (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from portllm.errors import ShapeError

BLOCK_ELEMENTS = 1 << 16  # with their float64 sums they stay in the L2 cache through all passes


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Weight update (out, in) in fp32 = scale · b (out, r) @ a (r, in). Raises ShapeError."""
    _check(a, b)
    return torch.mm(b.double(), a.double()).mul_(scale).float()


def add_delta(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight (out, in) + Δ: the exact sum rounded once to the weight's dtype. Raises ShapeError."""
    _check(a, b)
    if weight.shape != (b.shape[0], a.shape[1]):
        raise ShapeError(f"update is {b.shape[0]}×{a.shape[1]}, weight is {tuple(weight.shape)}; expected one shape")
    out = torch.empty_like(weight)
    Update(a, b, scale).add_rows(weight, 0, out, Scratch(weight.numel()))
    return out


class Scratch:
    """Work space for blocks of at most `elements` elements, reused so that no block pays for fresh memory."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self._kept: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[torch.dtype, torch.Size], Tensor] = {}

    def like(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of `weight`'s shape; the same memory for every call with the same dtype."""
        if (dtype, weight.shape) not in self._views:
            if dtype not in self._kept:
                self._kept[dtype] = torch.empty(self.elements, dtype=dtype)
            self._views[dtype, weight.shape] = self._kept[dtype][: weight.numel()].view(weight.shape)
        return self._views[dtype, weight.shape]


class Update:
    """Δ prepared for being added block by block; B, which may be as tall as a vocabulary, is widened row by row."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        """a (r, in) and b (out, r) in any floating dtype. Raises ShapeError."""
        _check(a, b)
        self._a, self._b, self._scale = a, b, scale

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of Δ."""
        return self._b.shape[0], self._a.shape[1]

    @cached_property
    def _wide_a(self) -> Tensor:
        return self._a.double()

    def add_rows(self, weight: Tensor, row: int, out: Tensor, scratch: Scratch) -> float:
        """out = rows of W from `row` on, `weight` (rows, in), + Δ's same rows, rounded once to the weight's dtype.

        The sum is formed in float64. Returns its largest absolute value once rounded, or NaN where there is one.
        """
        if weight.numel() == 0:
            return 0.0
        b = self._b[row : row + weight.shape[0]].double() * self._scale
        step, ties = max(1, BLOCK_ELEMENTS // weight.shape[1]), _Ties(out, scratch)
        for old, new, factor in zip(*(torch.split(whole, step) for whole in (weight, out, b)), strict=True):
            total, near = scratch.like(old, torch.float64), scratch.like(old, torch.float32)
            # float16 is widened several times as fast by way of float32
            total.copy_(near.copy_(old) if old.dtype == torch.float16 else old)
            torch.addmm(total, factor, self._wide_a, out=total)
            if new.dtype in (torch.float32, torch.float64):
                new.copy_(total)
            else:
                new.copy_(near.copy_(total))
                ties.find(near, total)
        ties.settle()
        return _largest(out)

    def exact(self) -> Tensor:
        """Δ whole, in float64."""
        return (self._b.double() * self._scale) @ self._wide_a


@dataclass(frozen=True)
class Block:
    """An update and where in a tensor, seen as (rows, columns), its upper left corner stands."""

    update: Update
    row: int = 0
    column: int = 0


class AddLora:
    """The edit (`edits.Edit`) that adds updates to blocks of a tensor; what is in no block stays as it is."""

    surveys = False

    def __init__(self, *blocks: Block) -> None:
        """Blocks of rows may straddle the writer's; no two may overlap. Raises ShapeError."""
        self._blocks = sorted(blocks, key=lambda block: (block.row, block.column))
        self._refuse_overlaps()

    def survey(self, old: Tensor, row: int, scratch: Scratch) -> None:
        """Nothing to look for."""

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:
        """Write old rows (count, columns) + Δ into `out`; see `Edit.rows` and `Update.add_rows`."""
        if old is None:
            raise ValueError("LoRA needs the old weight")
        found = list(self._within(row, *old.shape))
        if len(found) == 1 and found[0][1:] == (slice(0, old.shape[0]), slice(0, old.shape[1])):
            block = found[0][0]
            return block.update.add_rows(old, row - block.row, out, scratch)
        out.copy_(old)
        size = _largest(old) if old.numel() else 0.0
        for block, rows, columns in found:
            weight, start = old[rows, columns].contiguous(), row + rows.start - block.row
            total = torch.empty_like(weight)
            written = block.update.add_rows(weight, start, total, scratch)
            if size == size and not written <= size:  # NaN wins
                size = written
            out[rows, columns] = total
        return size

    def exact(self, old: Tensor | None) -> Tensor:
        """The whole sum in float64, not rounded; see `Edit.exact`."""
        if old is None:
            raise ValueError("LoRA needs the old weight")
        new = old.double().clone()
        for block in self._blocks:
            rows, columns = block.update.shape
            new[block.row : block.row + rows, block.column : block.column + columns] += block.update.exact()
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


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded to the nearest of `dtype`, ties to even, in one rounding.

    torch converts float64 to a 16-bit type by way of float32, which rounds twice. Rounding to odd on the way (the
    last bit is set when anything was lost) makes the second rounding right: Boldo and Melquiond, 2008.
    """
    near = value.float()
    if dtype in (torch.float32, torch.float64):
        return near if dtype == torch.float32 else value
    back = near.double()
    bits = near.view(torch.int32)
    bits.sub_((back.abs() > value.abs()).int())  # towards zero: sign and magnitude are separate bits
    bits.bitwise_or_((back != value).int())
    return near.to(dtype)


class _Ties:
    """Where rounding float64 to a 16-bit type by way of float32 may have rounded twice: rare, so settled all at once.

    Every tie of a 16-bit type is a float32. So where the float32 is none, it lies on the same side of the nearest one
    as the float64 does, and its rounding is the right one.
    """

    def __init__(self, out: Tensor, scratch: Scratch) -> None:
        self._out, self._scratch, self._start = out.view(-1), scratch, 0
        self._found: list[Tensor] = []
        self._values: list[Tensor] = []

    def find(self, near: Tensor, value: Tensor) -> None:
        """Note the ties among the next float32s, `near`, which were float64s, `value`."""
        if len(found := _ties(near, self._out.dtype, self._scratch)):
            self._values.append(value.view(-1).index_select(0, found))
            self._found.append(found.add_(self._start))
        self._start += near.numel()

    def settle(self) -> None:
        """Round them once."""
        if self._found:
            values = round_once(torch.cat(self._values), self._out.dtype)
            self._out.index_copy_(0, torch.cat(self._found), values)


def _ties(near: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Flat indices of all float32 values half-way between two of a 16-bit type, and of some that are not."""
    import numpy

    bits = near.view(-1).view(torch.int32).numpy()
    # fresh memory for the mask would cost more than the search
    mask = scratch.like(near, torch.int16).view(-1).numpy().view(numpy.bool_)
    if dtype == torch.bfloat16:
        size = 4  # numbers in eight bytes of the mask, which are searched at once
        numpy.equal(bits.view(numpy.int16), -0x8000, out=mask)  # the lower half; the upper one only of -0 and the like
    else:
        size, mask = 8, mask[: len(bits)]
        last = numpy.bitwise_and(bits, 0xFFF, out=scratch.like(near, torch.int32).view(-1).numpy())
        numpy.equal(last, 0, out=mask)  # the last 13 bits are 1000, or 0000 below float16's normal numbers
    whole = len(bits) // size * size
    found = numpy.flatnonzero(mask[: len(mask) // 8 * 8].view(numpy.int64) != 0)
    if len(found):
        found = (size * found[:, None] + numpy.arange(size)).ravel()
    return torch.from_numpy(numpy.append(found, numpy.arange(whole, len(bits))) if whole < len(bits) else found)


def _largest(values: Tensor) -> float:
    """Largest absolute value, NaN where there is one."""
    import numpy

    if values.dtype in (torch.float32, torch.float64):
        # amin and amax apart are faster than aminmax, and both pass NaN on
        low, high = float(values.amin()), float(values.amax())
        return max(-low, high) if low == low else low
    bits = values.view(torch.int16).numpy()  # as numbers they are in the order of magnitude, first + and then -
    positive, negative = int(bits.max()), int(bits.view(numpy.uint16).max()) - 0x8000
    return float(torch.tensor(max(positive, negative), dtype=torch.int16).view(values.dtype))


def inner(a1: Tensor, b1: Tensor, s1: float, a2: Tensor, b2: Tensor, s2: float) -> float:
    """⟨Δ1, Δ2⟩ = s1 s2 tr((B1ᵀB2)(A2A1ᵀ)) in float64: r1 × r2 matrices only. Raises ShapeError."""
    _check(a1, b1)
    _check(a2, b2)
    if a1.shape[1] != a2.shape[1] or b1.shape[0] != b2.shape[0]:
        raise ShapeError(
            f"updates are {b1.shape[0]}×{a1.shape[1]} and {b2.shape[0]}×{a2.shape[1]}; expected one module's shape"
        )
    left = b1.double().T @ b2.double()
    right = a1.double() @ a2.double().T
    return s1 * s2 * float((left * right).sum())


def delta_norm(a: Tensor, b: Tensor, scale: float) -> float:
    """‖Δ‖_F = |scale| √tr((BᵀB)(AAᵀ)) in float64, never forming BA. Raises ShapeError."""
    # rounding can leave a sum of squares a hair below zero
    return float(abs(scale) * max(inner(a, b, 1.0, a, b, 1.0), 0.0) ** 0.5)


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ShapeError(f"lora_A is {tuple(a.shape)} and lora_B is {tuple(b.shape)}, expected (r, in) and (out, r)")
