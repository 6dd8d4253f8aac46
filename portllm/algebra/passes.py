"""The sums of sums.py with numpy, in passes over blocks in float64, for machines without the compiled library.

Arrays of weights are float64, float32, float16, or uint16 with the bits of bfloat16.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from portllm.algebra.rounding import RowFactors, rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

BLOCK_ELEMENTS = 1 << 18  # large: taking the interpreter's lock more often costs more time than cache misses

HUGE = 8 << 20  # bytes; numpy requests huge pages from 4 MiB on
_OWN = threading.local()


def add(old: Array, out: Array, factors: RowFactors) -> None:
    """Write old (rows, columns) + b @ a to `out`, rounded once, ties to even; the two may not overlap."""
    import numpy

    step = max(1, BLOCK_ELEMENTS // old.shape[1])
    unsettled = []
    for first in range(0, len(old), step):
        rows = slice(first, first + step)
        part = RowFactors(factors.b[rows], factors.a, factors.reach[rows], factors.norms)
        space = _space(old[rows].shape)
        space.add(old[rows], part)
        indices = space.narrow(old[rows], out[rows], part)
        if len(indices):
            unsettled.append(indices + first * old.shape[1])
    if unsettled:
        factors.settle(old, out, numpy.concatenate(unsettled))


class _Space:
    """Work space for a block (rows, columns) and the passes over it; all work spaces of a thread share its memory."""

    def __init__(self, shape: tuple[int, int], memory: dict[str, Array]) -> None:
        import numpy

        self.shape, count = shape, shape[0] * shape[1]
        self.total, self.delta = (memory[name][:count].reshape(shape) for name in ("total", "delta"))
        self._flat = memory["bits"][:count]
        self._bits = self._flat.reshape(shape)
        self._near = self._bits.view(numpy.float32)
        self._halves, self._mask = self._flat.view(numpy.int16), memory["mask"][: 2 * count]
        self._fours = self._mask[: 2 * (count // 4 * 4)].view(numpy.int64)

    def add(self, old: Array, factors: RowFactors) -> None:
        """Compute the sums in `total`."""
        import numpy

        if old.dtype == numpy.uint16:
            numpy.copyto(self._bits, old)
            numpy.left_shift(self._bits, 16, out=self._bits)
            old = self._near
        numpy.copyto(self.total, old)
        self.total += numpy.matmul(factors.b, factors.a, out=self.delta)
        untouched = ~factors.b.any(axis=1)
        if untouched.any():
            self.total[untouched] += 0.0  # a BLAS product may be -0, which would keep the sign of a zero weight

    def narrow(self, old: Array, out: Array, factors: RowFactors) -> Array:
        """Round `total`, of weights `old`, to the nearest; return the flat indices of undecided elements."""
        import numpy

        if out.dtype == numpy.uint16:
            return self._narrow_bits(out, factors)
        if out.dtype == numpy.float64 or not factors.reach.any():
            numpy.copyto(out, self.total, casting="same_kind")
            return numpy.empty(0, numpy.intp)
        # round both ends of the interval that contains the exact sum: most are equal
        error = factors.row_errors(_sizes(old, self._flat))[:, None]
        low = self._flat.view(out.dtype)[: out.size].reshape(self.shape)
        numpy.subtract(self.total, error, out=low, casting="same_kind")
        numpy.add(self.total, error, out=out, casting="same_kind")
        unsigned = f"u{out.itemsize}"
        return numpy.flatnonzero(low.view(unsigned) != out.view(unsigned))

    def _narrow_bits(self, out: Array, factors: RowFactors) -> Array:
        """Round `total` to bfloat16 in `out` through float32; return the flat indices of undecided elements.

        Every tie of bfloat16 is a float32. Where the float32 is no tie and its error is less than half its last bit,
        it is on the same side of the nearest tie as the exact sum. Then adding half a unit rounds it.
        """
        import numpy

        numpy.copyto(self._near, self.total, casting="same_kind")
        undecided = self._ties()
        # cannot overflow: the lower half of infinity and of a bfloat16's NaN is 0
        numpy.add(self._bits, numpy.uint32(0x8000), out=self._bits)
        numpy.right_shift(self._bits, 16, out=self._bits)
        numpy.copyto(out, self._bits, casting="same_kind")
        undecided = numpy.union1d(undecided, self._small(out, factors))
        if not len(undecided):
            return numpy.empty(0, numpy.intp)
        i, j = numpy.divmod(undecided, self.shape[1])
        sums = self.total[i, j]
        error = factors.errors(i, j, sums)
        low, high = rounded(sums - error, out.dtype), rounded(sums + error, out.dtype)
        out[i, j] = high
        unsettled: Array = undecided[low != high]
        return unsettled

    def _small(self, out: Array, factors: RowFactors) -> Array:
        """Return flat indices of sums so small relative to their terms that float32 may be more exact."""
        import numpy

        bound = factors.reach * factors.norms.max()
        limit = (bound * 2.0**26 + (bound > 0) * 2.0**-120).astype(numpy.float32).view(numpy.uint32)
        size = self._halves[: out.size].view(numpy.uint16).reshape(self.shape)  # their bits are no longer needed
        numpy.left_shift(out, 1, out=size)
        mask = self._mask[: out.size].reshape(self.shape)
        numpy.less(size, ((limit >> 16) * 2 + 2 * (limit > 0)).astype(numpy.uint16)[:, None], out=mask)
        return numpy.flatnonzero(mask)

    def _ties(self) -> Array:
        """Return flat indices of all float32 values half-way between two of bfloat16, and of some that are not."""
        import numpy

        # true for the lower half of a tie, and for the upper half only of -0 and a few others
        numpy.equal(self._halves, -0x8000, out=self._mask)
        # tests four numbers in eight bytes of the mask
        indices = numpy.flatnonzero(self._fours != 0)
        if len(indices):
            indices = (4 * indices[:, None] + numpy.arange(4)).ravel()
        count, tested = len(self._flat), 4 * len(self._fours)
        return numpy.append(indices, numpy.arange(tested, count)) if tested < count else indices


def _sizes(old: Array, scratch: Array) -> Array:
    """Return the largest finite absolute value of each row of a float16 or float32 array, in float64."""
    import numpy

    size, special = (0x7FFF, 0x7C00) if old.itemsize == 2 else (0x7FFFFFFF, 0x7F800000)
    bits = scratch.view(f"u{old.itemsize}")[: old.size].reshape(old.shape)
    numpy.bitwise_and(old.view(bits.dtype), size, out=bits)
    if bits.max() >= special:
        bits[bits >= special] = 0
    sizes: Array = bits.max(axis=1).view(old.dtype).astype(numpy.float64)
    return sizes


def _space(shape: tuple[int, int]) -> _Space:
    """Return this thread's work space of that shape, uninitialised: no block allocates memory."""
    import numpy

    spaces: dict[tuple[int, int], _Space] = _OWN.__dict__.setdefault("spaces", {})
    if shape not in spaces:
        memory: dict[str, Array] = _OWN.__dict__.setdefault("memory", {})
        count = max(shape[0] * shape[1], BLOCK_ELEMENTS)
        if not memory or len(memory["bits"]) < count:
            spaces.clear()
            buffer = numpy.empty(max(22 * count, HUGE), "u1")
            offset = 0
            for name, dtype, each in (("total", "f8", 8), ("delta", "f8", 8), ("bits", "u4", 4), ("mask", "?", 2)):
                memory[name] = buffer[offset : offset + each * count].view(dtype)
                offset += each * count
        spaces[shape] = _Space(shape, memory)
    return spaces[shape]
