"""Laws of the sums W + Δ: exact, rounded once, and the same bits by numpy and by the compiled library."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from portllm.algebra import kernel, rounding, sums
from portllm.errors import ParamsError
from tests.algebra.conftest import use

Array = NDArray[Any]
UINT16, FLOAT16, FLOAT32 = numpy.dtype("u2"), numpy.dtype("f2"), numpy.dtype("f4")  # the first holds bfloat16
DTYPES = st.sampled_from([UINT16, FLOAT16, FLOAT32])
DIGITS = {UINT16: (8, -126, 127), FLOAT16: (11, -14, 15), FLOAT32: (24, -126, 127)}  # and exponents of normal numbers
WAYS = ["plain", "avx2", "avx512"]


def random(seed: int) -> numpy.random.Generator:
    return numpy.random.default_rng(seed)


def as_bits(values: Array) -> Array:
    return values.view(f"u{values.itemsize}")


def narrowed(values: Array, dtype: Any) -> Array:
    """Values cut short, not rounded, to a dtype: any will do as a weight."""
    if dtype != UINT16:
        return values.astype(dtype)
    return (values.astype(numpy.float32).view(numpy.uint32) >> 16).astype(numpy.uint16)


def added(weight: Array, a: Array, b: Array, scale: float, out: Array | None = None) -> tuple[float, Array]:
    """(size, sums) by whatever way is set."""
    out = numpy.full_like(weight, 7) if out is None else out
    return sums.Update(a, b, scale).add_rows(weight, 0, out), out


def by(way: str, weight: Array, a: Array, b: Array, scale: float) -> tuple[float, Array]:
    with pytest.MonkeyPatch.context() as patch:
        use(way, patch)
        return added(weight, a, b, scale)


def spread(draw: st.DrawFn, shape: tuple[int, ...], exponents: st.SearchStrategy[tuple[int, int]]) -> Array:
    """Numbers of all 24 bits, their exponents spread over a range, and here and there 0."""
    rng, (low, high) = random(draw(st.integers(0, 1 << 30))), draw(exponents)
    with numpy.errstate(all="ignore"):
        values = rng.standard_normal(shape) * 2.0 ** rng.integers(low, high, shape, endpoint=True)
        values = numpy.clip(values * (rng.random(shape) > 0.02), -3e38, 3e38)
        return values.astype(numpy.float32)


def grid(draw: st.DrawFn, shape: tuple[int, ...]) -> Array:
    """Small whole numbers over a power of 2, so that sums are exact in float64 and ties common."""
    rng, unit = random(draw(st.integers(0, 1 << 30))), 2.0 ** draw(st.integers(-12, 4))
    return (rng.integers(-3, 4, shape) * unit).astype(numpy.float32)


NARROW = st.sampled_from([(-8, -4), (-30, 0), (-2, 2)])
WIDE = st.sampled_from([(-8, -4), (-8, -4), (-60, 10), (-149, -100), (-149, 127), (90, 127)])


@st.composite
def problems(draw: st.DrawFn, most: tuple[int, int, int]) -> tuple[Array, Array, Array, float]:
    """(weight, a, b, scale) of at most (rows, columns, rank), of every kind of number."""
    rows, columns, rank = (draw(st.integers(1, size)) for size in most)
    dtype, kind = draw(DTYPES), draw(st.sampled_from(["usual", "wide", "grid", "bits"]))
    if kind == "grid":
        weight, a, b = (grid(draw, shape) for shape in ((rows, columns), (rank, columns), (rows, rank)))
    else:
        span = NARROW if kind == "usual" else WIDE
        weight, a, b = (spread(draw, shape, span) for shape in ((rows, columns), (rank, columns), (rows, rank)))
    with numpy.errstate(all="ignore"):
        narrow = narrowed(weight, dtype)
    if kind == "bits":  # infinity, NaN, subnormal numbers, -0: whatever 16 or 32 bits may be
        raw = random(draw(st.integers(0, 1 << 30))).integers(0, 1 << (8 * dtype.itemsize), (rows, columns))
        narrow = raw.astype(f"u{dtype.itemsize}").view(dtype)
    if draw(st.booleans()):
        b[draw(st.integers(0, rows - 1))] = 0
    return narrow, a, b, draw(st.sampled_from([1.0, 2.0, 0.7, -1.0, 0.0, 2.0**-20, 16 / math.sqrt(8)]))


@pytest.mark.parametrize("way", WAYS)
@given(problem=problems((9, 100, 40)))
@settings(max_examples=150, deadline=None)
def test_the_library_gives_the_bits_that_numpy_gives(way: str, problem: tuple[Array, Array, Array, float]) -> None:
    size, expected = by("numpy", *problem)
    found_size, found = by(way, *problem)
    assert as_bits(found).tolist() == as_bits(expected).tolist()
    assert found_size == size or (math.isnan(found_size) and math.isnan(size))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [UINT16, FLOAT16, FLOAT32])
@pytest.mark.parametrize("rank", [8, 64, 300])
def test_the_library_gives_the_bits_that_numpy_gives_at_length(way: str, dtype: Any, rank: int) -> None:
    rng = random(rank)
    weight = narrowed(rng.standard_normal((67, 1000)) * 0.02, dtype)
    a, b = (rng.standard_normal(shape).astype("f4") * 0.05 for shape in ((rank, 1000), (67, rank)))
    size, expected = by("numpy", weight, a, b, 2.0)
    found_size, found = by(way, weight, a, b, 2.0)
    assert (as_bits(found) == as_bits(expected)).all()
    assert found_size == size == sums.largest(expected)


def truth(weight: Array, a: Array, b: Array, scale: float) -> list[list[float]]:
    """The sums by whole numbers, rounded by hand to the dtype's digits, ties to even."""
    with numpy.errstate(invalid="ignore"):  # NaN of the kind that signals
        old = rounding.widened(weight)
    wide = b.astype(float) * scale
    digits, low, high = DIGITS[weight.dtype]

    def one(i: int, j: int) -> float:
        if not math.isfinite(old[i, j]):
            return float(old[i, j])
        terms = (Fraction(wide[i, k].item()) * Fraction(a[k, j].item()) for k in range(len(a)))
        exact = sum(terms, Fraction(old[i, j].item()))
        size, unit = abs(exact), Fraction(2) ** (low - digits + 1)
        while size >= unit * 2**digits:
            unit *= 2
        value = round(size / unit) * unit  # halves to even
        return math.copysign(math.inf if value >= Fraction(2) ** (high + 1) else float(value), exact if exact else 1)

    return [[one(i, j) for j in range(weight.shape[1])] for i in range(len(weight))]


@given(problem=problems((3, 5, 4)))
@settings(max_examples=150, deadline=None)
def test_sums_are_the_truth_rounded_once(way: str, problem: tuple[Array, Array, Array, float]) -> None:
    size, found = added(*problem)
    expected = numpy.array(truth(*problem))
    assert [repr(x) for x in rounding.widened(found).ravel()] == [repr(x) for x in expected.ravel()]  # -0 is not 0
    assert size == numpy.abs(expected).max() or (math.isnan(size) and numpy.isnan(expected).any())


@pytest.mark.parametrize("dtype", [UINT16, FLOAT16, FLOAT32])
@pytest.mark.parametrize("hair", [-30, -50, -80, -1000])
def test_ties_and_a_hair_beside_them(way: str, dtype: Any, hair: int) -> None:
    """1 + half a unit, and + or - what float32 cannot hold, nor float64: up, to even, down, at every exponent."""
    digits, low, high = DIGITS[dtype]
    exponents = numpy.arange(low, high, dtype=float)[:, None]
    weight = rounding.rounded(2.0**exponents + [0, 0, 0, 2.0, 2.0, 2.0] * 2.0 ** (exponents - digits), dtype)
    # 1/2 a unit, and a hair: a product of two numbers that float32 holds
    a = numpy.array([[1.0] * 6, [0, -1, 1, 0, -1, 1]]) * [[1.0], [2.0 ** (hair // 2)]]
    b = 2.0 ** (exponents - digits) * [1.0, 2.0 ** (hair - hair // 2)]
    found = added(weight, a, b, 1.0)[1]
    below, above = as_bits(weight)[:, 0], as_bits(weight)[:, 0] + 1
    expected = numpy.stack([below, below, above, above + 1, above, above + 1], axis=1)
    assert (as_bits(found) == expected).all()


def test_a_weight_that_stays_keeps_its_bits_and_zero_is_positive(way: str) -> None:
    a, b = numpy.array([[1.0, -1.0, 0.0]], "f4"), numpy.array([[0.0], [-0.0], [1.0]], "f4")
    for weight in (numpy.full((3, 3), 0x8000, "u2"), numpy.full((3, 3), -0.0, "f2"), numpy.full((3, 3), -0.0, "f4")):
        found = rounding.widened(added(weight, a, b, 1.0)[1])
        assert found.tolist() == [[0, 0, 0], [0, 0, 0], [1, -1, 0]]
        assert not numpy.signbit(found[found == 0]).any()


@pytest.mark.parametrize("dtype", [UINT16, FLOAT16, FLOAT32])
def test_a_sum_too_small_for_the_dtype_keeps_its_sign(way: str, dtype: Any) -> None:
    a, b = numpy.array([[2.0**-100, -(2.0**-100), 0.0]], "f4"), numpy.array([[2.0**-100]], "f4")
    found = rounding.widened(added(narrowed(numpy.zeros((1, 3)), dtype), a, b, 1.0)[1])
    assert [repr(x) for x in found[0].tolist()] == ["0.0", "-0.0", "0.0"]


@pytest.mark.parametrize("dtype", [UINT16, FLOAT16, FLOAT32])
@pytest.mark.parametrize("scale", [0.7, 2.0**-20, 2.0**130])
def test_scaled_factors_beyond_the_range_of_float32(way: str, dtype: Any, scale: float) -> None:
    a, b = numpy.array([[2.0**127, -(2.0**120)]], "f4"), numpy.array([[2.0**-149], [2.0**-2]], "f4")
    weight = narrowed(numpy.array([[0.0, 2.0**-20], [1.0, -1.0]]), dtype)
    found = rounding.widened(added(weight, a, b, scale)[1])
    assert found.tolist() == truth(weight, a, b, scale)


@pytest.mark.parametrize("dtype", [UINT16, FLOAT16])
def test_factors_that_float32_would_round_far_off(way: str, dtype: Any) -> None:
    """0.7 of the least number is the least one in float32: 256 terms add up to the other side of a tie."""
    exponent = -14 if dtype == FLOAT16 else -30
    half_a_unit = 2.0 ** (exponent - DIGITS[dtype][0])
    a = numpy.full((256, 1), half_a_unit * 2.0**149 / (0.85 * 256), "f4")
    weight = narrowed(numpy.array([[2.0**exponent]]), dtype)
    assert (added(weight, a, numpy.full((1, 256), 2.0**-149, "f4"), 0.7)[1] == weight).all()


def test_a_product_in_two_parts_is_whole() -> None:
    rng = random(5)
    b, a = (rng.standard_normal((50, 3)) * 2.0 ** rng.integers(-400, 400, (50, 3)) for _ in range(2))
    high, low, whole = rounding._products(b, a)
    assert whole.all()
    for n, k in numpy.ndindex(b.shape):
        assert Fraction(high[n, k]) + Fraction(low[n, k]) == Fraction(b[n, k]) * Fraction(a[n, k])


@pytest.mark.parametrize("dtype", [UINT16, FLOAT16, FLOAT32])
def test_the_nearest_by_fractions(dtype: Any) -> None:
    digits, low, high = DIGITS[dtype]
    unit, hair = Fraction(2) ** (1 - digits), Fraction(2) ** -2000
    for exact, expected in ((1 + unit / 2, 1), (1 + unit / 2 + hair, 1 + unit), (1 + unit * 3 / 2, 1 + 2 * unit)):
        assert rounding.nearest(exact, dtype.name) == expected
        assert rounding.nearest(-exact, dtype.name) == -expected
    assert repr(rounding.nearest(-hair, dtype.name)) == "-0.0"
    least = Fraction(2) ** (low - digits + 1)
    assert rounding.nearest(least * 3 / 2, dtype.name) == 2 * least
    assert rounding.nearest(Fraction(2) ** 5000, dtype.name) > 2.0**high


def test_more_ties_than_the_library_hands_back(way: str) -> None:
    weight = numpy.full((70, 100), 0x3F80, "u2")  # 1
    ones = numpy.ones((70, 1), "f4")
    found = added(weight, ones[:1].repeat(100, axis=1), ones, 2.0**-8)[1]
    assert found.size > kernel.ROOM
    assert (found == 0x3F80).all()  # 1 is even
    assert (added(weight + 1, ones[:1].repeat(100, axis=1), ones, 2.0**-8)[1] == 0x3F82).all()


@pytest.mark.parametrize("dtype", [UINT16, FLOAT16, FLOAT32])
def test_weights_may_lie_anywhere_in_memory(way: str, dtype: Any) -> None:
    rng = random(3)
    weight = narrowed(rng.standard_normal((6, 45)), dtype)
    a, b = rng.standard_normal((5, 45)).astype("f4"), rng.standard_normal((6, 5)).astype("f4")
    expected = added(weight, a, b, 0.3)[1]
    room = numpy.zeros((6, 90), dtype)
    for place in (room[:, 20:65], room[:, ::2], numpy.zeros((45, 6), dtype).T):  # rows apart, columns apart, turned
        place[:] = weight
        out = numpy.zeros_like(room)[:, 3:48]
        assert (added(place, a, b, 0.3, out)[1] == expected).all()
        added(place, a, b, 0.3, place)  # onto itself
        assert (place == expected).all()
    assert not room[:, 1:20:2].any()
    raw = memoryview(bytearray(weight.nbytes + 1))[1:]
    crooked = numpy.frombuffer(raw, dtype).reshape(weight.shape)
    crooked[:] = weight
    assert (added(crooked, a, b, 0.3)[1] == expected).all()


@pytest.mark.parametrize("dtype", [UINT16, FLOAT16, FLOAT32])
def test_factors_of_other_kinds(way: str, dtype: Any) -> None:
    """float64 that float32 does not hold, rank 0, no rows: all are summed as the truth is."""
    weight = narrowed(numpy.array([[1.0, 0.5, -3.0]]), dtype)
    third = numpy.full((2, 3), 1 / 3)
    found = added(weight, third, numpy.full((1, 2), 1e-3), 1.0)[1]
    assert rounding.widened(found).tolist() == truth(weight, third, numpy.full((1, 2), 1e-3), 1.0)
    assert (added(weight, numpy.ones((0, 3)), numpy.ones((1, 0)), 1.0)[1] == weight).all()
    assert sums.Update(third, numpy.ones((1, 2)), 1.0).add_rows(weight[:0], 0, weight[:0].copy()) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300])
def test_nan_has_one_pattern_and_what_overflows_is_told(way: str, bad: float) -> None:
    a, b = numpy.array([[bad, 1.0]]), numpy.array([[1e200], [-1e200], [0.0]])
    for weight in (numpy.zeros((3, 2), "u2"), numpy.zeros((3, 2), "f2"), numpy.zeros((3, 2), "f4")):
        size, found = added(weight, a, b, 1.0)
        assert not size < math.inf
        assert set(as_bits(found[numpy.isnan(rounding.widened(found))]).tolist()) <= {0x7FC0, 0x7E00, 0x7FC00000}
    weight = numpy.array([[0xFFFF, 0x7F81, 0x7F80]], "u2")
    assert added(weight, numpy.ones((1, 3)), numpy.ones((1, 1)), 1.0)[1].tolist() == [[0x7FC0, 0x7FC0, 0x7F80]]


def test_the_variable_says_who_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel.VARIABLE, "numpy")
    assert kernel.name() == "numpy"
    monkeypatch.setenv(kernel.VARIABLE, "abacus")
    with pytest.raises(ParamsError, match="PORTLLM_KERNEL is 'abacus', expected numpy, plain, avx2"):
        kernel.name()


def test_a_library_of_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    monkeypatch.setattr(kernel, "VERSION", -1)
    kernel._library.cache_clear()
    try:
        assert kernel.name() == "numpy"
    finally:
        kernel._library.cache_clear()
