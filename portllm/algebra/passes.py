"""The sums of sums.py by numpy, in passes over blocks in float64: for machines without the compiled library.

As arrays, weights are float64, float32, float16, or uint16, which holds the bits of bfloat16.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from portllm.algebra.rounding import Factors, rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

BLOCK_ELEMENTS = 1 << 18  # fewer turns of the interpreter's lock, which cost more than the caches do

HUGE = 8 << 20  # numpy asks for huge pages from 4 MiB on
_OWN = threading.local()


def add(old: Array, out: Array, factors: Factors) -> None:
    """out = old (rows, columns) + b @ a, rounded once, ties to even; the two may not overlap."""
    import numpy

    step = max(1, BLOCK_ELEMENTS // old.shape[1])
    unsettled = []
    for first in range(0, len(old), step):
        rows = slice(first, first + step)
        part = Factors(factors.b[rows], factors.a, factors.reach[rows], factors.norms)
        space = _space(old[rows].shape)
        space.add(old[rows], part)
        found = space.narrow(old[rows], out[rows], part)
        if len(found):
            unsettled.append(found + first * old.shape[1])
    if unsettled:
        factors.settle(old, out, numpy.concatenate(unsettled))


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

    def add(self, old: Array, factors: Factors) -> None:
        """Form the sums in `total`."""
        import numpy

        if old.dtype == numpy.uint16:
            numpy.copyto(self._bits, old)
            numpy.left_shift(self._bits, 16, out=self._bits)
            old = self._near
        numpy.copyto(self.total, old)
        self.total += numpy.matmul(factors.b, factors.a, out=self.delta)
        untouched = ~factors.b.any(axis=1)
        if untouched.any():
            self.total[untouched] += 0.0  # a library's product may be -0, which would keep a weight's sign

    def narrow(self, old: Array, out: Array, factors: Factors) -> Array:
        """Round `total`, of weights `old`, to the nearest; returns the flat indices still to be settled."""
        import numpy

        if out.dtype == numpy.uint16:
            return self._narrow_bits(out, factors)
        if out.dtype == numpy.float64 or not factors.reach.any():
            numpy.copyto(out, self.total, casting="same_kind")
            return numpy.empty(0, numpy.intp)
        # rounded from either end of where the exact sum can be: most often to the same
        error = factors.row_errors(_sizes(old, self._flat))[:, None]
        low = self._flat.view(out.dtype)[: out.size].reshape(self.shape)
        numpy.subtract(self.total, error, out=low, casting="same_kind")
        numpy.add(self.total, error, out=out, casting="same_kind")
        unsigned = f"u{out.itemsize}"
        return numpy.flatnonzero(low.view(unsigned) != out.view(unsigned))

    def _narrow_bits(self, out: Array, factors: Factors) -> Array:
        """Every tie of bfloat16 is a float32: where the float32 is none, and the error less than half its last bit, it
        lies on the same side of the nearest one as the exact sum does, and adding half a unit rounds it."""
        import numpy

        numpy.copyto(self._near, self.total, casting="same_kind")
        found = self._ties()
        # cannot overflow: the lower half of infinity and of a bfloat16's NaN is 0
        numpy.add(self._bits, numpy.uint32(0x8000), out=self._bits)
        numpy.right_shift(self._bits, 16, out=self._bits)
        numpy.copyto(out, self._bits, casting="same_kind")
        found = numpy.union1d(found, self._small(out, factors))
        if not len(found):
            return numpy.empty(0, numpy.intp)
        i, j = numpy.divmod(found, self.shape[1])
        sums = self.total[i, j]
        error = factors.errors(i, j, sums)
        low, high = rounded(sums - error, out.dtype), rounded(sums + error, out.dtype)
        out[i, j] = high
        unsettled: Array = found[low != high]
        return unsettled

    def _small(self, out: Array, factors: Factors) -> Array:
        """Flat indices of sums that are so small beside their terms that float32 may be more exact than they are."""
        import numpy

        bound = factors.reach * factors.norms.max()
        limit = (bound * 2.0**26 + (bound > 0) * 2.0**-120).astype(numpy.float32).view(numpy.uint32)
        size = self._halves[: out.size].view(numpy.uint16).reshape(self.shape)  # their bits are no longer needed
        numpy.left_shift(out, 1, out=size)
        mask = self._mask[: out.size].reshape(self.shape)
        numpy.less(size, ((limit >> 16) * 2 + 2 * (limit > 0)).astype(numpy.uint16)[:, None], out=mask)
        return numpy.flatnonzero(mask)

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


def _sizes(old: Array, scratch: Array) -> Array:
    """The largest finite absolute value of each row of float16 or float32, in float64."""
    import numpy

    size, special = (0x7FFF, 0x7C00) if old.itemsize == 2 else (0x7FFFFFFF, 0x7F800000)
    bits = scratch.view(f"u{old.itemsize}")[: old.size].reshape(old.shape)
    numpy.bitwise_and(old.view(bits.dtype), size, out=bits)
    if bits.max() >= special:
        bits[bits >= special] = 0
    sizes: Array = bits.max(axis=1).view(old.dtype).astype(numpy.float64)
    return sizes


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
