"""The exact sum W + b @ a of single elements, rounded once, for sums whose rounding float64 cannot decide.

Arrays of weights are float32, float16, or uint16 with the bits of bfloat16; factors are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

DIGITS = {"uint16": (8, -133), "float16": (11, -24), "float32": (24, -149)}  # and exponent of the least unit
UNIT = 2.0**-53  # unit roundoff of float64
LARGE = 2.0**900  # bound of the sums; below it no product overflows
TOGETHER = 4096  # elements computed exactly at a time


@dataclass(frozen=True)
class RowFactors:
    """The factors of some rows, b (rows, r) scaled and a (r, columns), and the bound of float64's error in b @ a.

    In any order of the terms, the error is at most reach (rows,) · norms (columns,). ‖a's column‖ times ‖b's row‖
    bounds the sum of the terms' sizes (Cauchy and Schwarz); `reach` contains r roundings and a margin. Both are 0
    where there is nothing to bound: rows of b that are 0, and factors that are not finite or too large.
    """

    b: Array
    a: Array
    reach: Array
    norms: Array

    def errors(self, i: Array, j: Array, sums: Array) -> Array:
        """Return bounds (n,) of the errors of float64 `sums` (n,) at rows i and columns j, with the last addition's."""
        import numpy

        reach = self.reach[i]
        return numpy.where(reach > 0, reach * self.norms[j] + abs(sums) * (2.1 * UNIT) + 2.0**-1000, 0)

    def row_errors(self, sizes: Array) -> Array:
        """Return bounds (rows,) of the error of any sum of a row whose weights are at most `sizes` (rows,)."""
        reach = self.reach * self.norms.max()
        sizes = sizes + reach / (max(1, len(self.a)) * UNIT)  # bounds the sums: reach contains that many roundings
        bound: Array = reach + (reach > 0) * (sizes * (2.1 * UNIT) + 2.0**-1000)
        return bound

    def settle(self, old: Array, out: Array, flat: Array) -> None:
        """Write the exact sums of the weights `old` at the flat indices `flat` to `out`, rounded once."""
        import numpy

        for first in range(0, len(flat), TOGETHER):
            i, j = numpy.divmod(flat[first : first + TOGETHER], old.shape[1])
            out[i, j] = exactly(old[i, j], self.b[i], self.a[:, j].T)


def norms(values: Array, axis: int) -> Array:
    """Return upper bounds of the Euclidean norms along an axis, in float64, also where squares underflow."""
    import numpy

    squares = numpy.einsum("ij,ij->j" if axis == 0 else "ij,ij->i", values, values, dtype=numpy.float64)
    bound: Array = numpy.sqrt(squares) * (1 + 2.0**-20) + values.any(axis=axis) * 2.0**-500
    return bound


def rounded(values: Array, dtype: Any) -> Array:
    """Return float64 values rounded once to the nearest of `dtype`, ties to even.

    numpy rounds so to float16 and float32. The way to bfloat16 goes through float32, rounded to odd, which makes the
    second rounding right: Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008.
    """
    import numpy

    if dtype != numpy.uint16:
        return values.astype(dtype)
    near = values.astype(numpy.float32)
    single = near.astype(numpy.float64)
    bits = near.view(numpy.uint32)
    bits -= numpy.abs(single) > numpy.abs(values)  # towards zero: sign and magnitude are separate bits
    bits |= single != values  # sets the last bit where the value is inexact
    bits += numpy.uint32(0x7FFF) + (bits >> 16 & 1)
    narrow = (bits >> 16).astype(numpy.uint16)
    narrow[numpy.isnan(values)] = 0x7FC0
    return narrow


def widened(weights: Array) -> Array:
    """Return the weights in float64."""
    import numpy

    if weights.dtype == numpy.uint16:
        weights = (weights.astype(numpy.uint32) << 16).view(numpy.float32)
    return weights.astype(numpy.float64)


def exactly(weights: Array, b: Array, a: Array) -> Array:
    """Return weights (n,) + the sums of b (n, r) * a (n, r), exact and rounded once; an exact sum of 0 is +0."""
    import numpy

    old = widened(weights)
    sums = old + numpy.einsum("nk,nk->n", b, a) + 0.0
    unsure = numpy.flatnonzero(numpy.isfinite(old) & ~_exact_already(old, b, a))
    high, low, is_exact = _products(b[unsure], a[unsure])
    for n, terms, exact in zip(unsure, numpy.concatenate([high, low], axis=1).tolist(), is_exact, strict=True):
        if exact:
            sums[n] = _odd_sum([float(old[n]), *terms])
        else:
            products = (Fraction(x) * Fraction(y) for x, y in zip(b[n].tolist(), a[n].tolist(), strict=True))
            sums[n] = nearest(sum(products, Fraction(float(old[n]))), weights.dtype.name)
    return rounded(sums, weights.dtype)


def _products(b: Array, a: Array) -> tuple[Array, Array, Array]:
    """Return (high, low, is_exact) of b (n, r) * a: high + low is the product, exactly where `is_exact` (n,) is true.

    Dekker, A floating-point technique for extending the available precision, 1971.
    """
    import numpy

    (b, b_exponent), (a, a_exponent) = numpy.frexp(b), numpy.frexp(a)
    exponent = b_exponent + a_exponent
    tops = [x * (2.0**27 + 1) - (x * (2.0**27 + 1) - x) for x in (b, a)]
    high = b * a
    low = tops[0] * tops[1] - high + tops[0] * (a - tops[1]) + (b - tops[0]) * tops[1]
    low += (b - tops[0]) * (a - tops[1])
    return numpy.ldexp(high, exponent), numpy.ldexp(low, exponent), ((exponent > -900) | (high == 0)).all(axis=1)


def _odd_sum(terms: list[float]) -> float:
    """Return the exact sum rounded to float64, with its last bit set where it is inexact; see `rounded`."""
    near = math.fsum(terms)  # the nearest float64
    rest = math.fsum([*terms, -near])
    if rest and int(math.ldexp(math.frexp(near)[0], 53)) % 2 == 0:
        return math.nextafter(near, math.copysign(math.inf, rest))
    return near + 0.0


def nearest(exact: Fraction, dtype: str) -> float:
    """Return `exact` rounded to the nearest value of a dtype, ties to even, in integer arithmetic.

    A result above the dtype's largest value is not one of its values: the caller's conversion makes it infinity.
    """
    if exact == 0:
        return 0.0
    digits, least = DIGITS[dtype]
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = max(exponent - digits + 1, least)
    value = math.inf if exponent > 128 else math.ldexp(round(size / Fraction(2) ** unit), unit)  # halves to even
    return value if exact > 0 else -value


def _exact_already(old: Array, b: Array, a: Array) -> Array:
    """Return where float64 is exact: all terms and their sums are multiples, less than 2^53, of one unit."""
    import numpy

    unit = numpy.minimum(_last_bit(old), _last_bit(b).min(axis=1) + _last_bit(a).min(axis=1))
    size = (numpy.abs(old) + numpy.einsum("nk,nk->n", numpy.abs(b), numpy.abs(a))) * (1 + 2.0**-20)
    is_exact: Array = (unit >= -1074) & (size < numpy.ldexp(1.0, numpy.minimum(unit, 900) + 53))
    return is_exact


def _last_bit(values: Array) -> Array:
    """Return the exponents of the last bits that are set; the exponent for 0 is large."""
    import numpy

    fraction, exponent = numpy.frexp(values)
    digits = numpy.ldexp(fraction, 53).astype(numpy.int64)
    last = numpy.frexp((digits & -digits).astype(numpy.float64))[1] - 1
    return numpy.where(digits == 0, 2000, exponent - 53 + last)
