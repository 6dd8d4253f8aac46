"""Laws of the weight update: one rounding, whatever the blocks; norms without the product."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from portllm.algebra import lora, sums
from portllm.errors import ShapeError

PRECISION = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}  # digits, least exponent
DTYPES = st.sampled_from(sorted(PRECISION, key=str))


def rounded(exact: Fraction, dtype: torch.dtype) -> Fraction:
    """`exact` rounded to the nearest value of `dtype`, ties to even, by whole-number arithmetic."""
    if exact == 0:
        return exact
    digits, least = PRECISION[dtype]
    exponent = math.floor(math.log2(abs(exact))) - digits + 1
    while abs(exact) >= Fraction(2) ** (exponent + digits):
        exponent += 1
    while abs(exact) < Fraction(2) ** (exponent + digits - 1):
        exponent -= 1
    unit = Fraction(2) ** max(exponent, least)
    return round(exact / unit) * unit  # Python rounds halves to even


def nearest(exact: Fraction, dtype: torch.dtype) -> float:
    """`rounded` as a number; infinite where it is too large for the type."""
    value = rounded(exact, dtype)
    return float(value) if abs(value) <= torch.finfo(dtype).max else math.copysign(math.inf, value)


def whole(draw: st.DrawFn, shape: tuple[int, int], size: int) -> torch.Tensor:
    count = shape[0] * shape[1]
    return torch.tensor(draw(st.lists(st.integers(-size, size), min_size=count, max_size=count))).double().view(shape)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """(weight, a, b, scale) whose float64 sum is exact, so that ties are common and the truth is known."""
    rows, columns, rank = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    dtype = draw(DTYPES)
    unit = 2.0 ** draw(st.sampled_from([0, 0, -13, -20, -128, 6]))  # subnormal and overflowing numbers, too
    weight = whole(draw, (rows, columns), 127) * 2.0 ** draw(st.integers(-6, 2)) * unit
    a = whole(draw, (rank, columns), 63) * 2.0 ** draw(st.integers(-8, 0))
    b = whole(draw, (rows, rank), 63) * 2.0 ** draw(st.integers(-8, 0)) * unit
    return weight.to(dtype), a.float(), b.float(), draw(st.sampled_from([1.0, 2.0, 0.5, -1.0, 0.0]))


@pytest.mark.usefixtures("way")
@given(problems())
@settings(max_examples=120, deadline=None)
def test_sum_is_the_exact_one_rounded_once(problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]) -> None:
    weight, a, b, scale = problem
    result = lora.add_delta(weight, a, b, scale)
    assert result.dtype == weight.dtype
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            terms = (Fraction(b[i, k].item()) * Fraction(a[k, j].item()) for k in range(len(a)))
            exact = Fraction(weight[i, j].item()) + Fraction(scale) * sum(terms, Fraction(0))
            assert result[i, j].item() == nearest(exact, weight.dtype)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 3, 27, 32])
def test_sums_at_ties_and_a_hair_beside_them(dtype: torch.dtype, columns: int) -> None:
    """1 + half a unit, + or - what float32 cannot hold: at every exponent, subnormal numbers included."""
    digits, least = PRECISION[dtype]
    exponents = torch.arange(least - 2, 15 if dtype == torch.float16 else 127, dtype=torch.float64)
    near = torch.tensor([1.5, 0.5, 1.0])[torch.arange(columns) % 3].double()
    hair = torch.tensor([0.0, -1.0, 1.0])[torch.arange(columns) // 3 % 3].double() * 2.0**-34
    half_a_unit = 2.0 ** ((exponents - digits + 1).clamp(min=least) - 1)
    b = torch.stack([half_a_unit, half_a_unit], dim=1)
    weight = (2.0**exponents).to(dtype).unsqueeze(1).repeat(1, columns)
    result = lora.add_delta(weight, torch.stack([near, hair]), b, 1.0)
    for i in range(len(weight)):
        for j in range(columns):
            exact = Fraction(weight[i, j].item()) + Fraction(b[i, 0].item()) * (
                Fraction(near[j].item()) + Fraction(hair[j].item())
            )
            assert result[i, j].item() == nearest(exact, dtype)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_sum_equals_float64_rounded_once_on_realistic_weights(dtype: torch.dtype, rank: int) -> None:
    torch.manual_seed(rank)
    weight = torch.randn(300, 257).mul_(0.02)
    weight[3, :5] = 4.0  # an outlier widens the error bound of its whole block
    weight = weight.to(dtype)
    a, b = torch.randn(rank, 257) * 0.02, torch.randn(300, rank) * 0.02
    wide = torch.addmm(weight.double(), b.double() * 0.7, a.double())
    result = lora.add_delta(weight, a, b, 0.7)
    assert torch.equal(result, lora.round_once(wide, dtype))
    if dtype == torch.float32:
        assert not torch.equal(result, weight + 0.7 * (b @ a))  # fp32 throughout is not good enough


@pytest.mark.usefixtures("way")
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), DTYPES)
@settings(max_examples=50, deadline=None)
def test_blocks_do_not_matter(heights: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(sum(heights))
    rows = sum(heights)
    weight, a, b = torch.randn(rows, 9).to(dtype), torch.randn(2, 9), torch.randn(rows, 2)
    whole_result = lora.add_delta(weight, a, b, 0.3)
    update, row = sums.Update(a, b, 0.3), 0
    for height in heights:
        out = torch.empty(height, 9, dtype=dtype)
        size = update.add_rows(weight[row : row + height], row, out)
        assert torch.equal(out, whole_result[row : row + height])
        assert size >= out.float().abs().max() * (1 - 2**-8)
        row += height


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_size_tells_of_values_that_do_not_fit(dtype: torch.dtype, bad: float) -> None:
    a, b = torch.full((1, 3), bad), torch.full((2, 1), 1e10)
    size = sums.Update(a, b, 1.0).add_rows(torch.ones(2, 3, dtype=dtype), 0, torch.empty(2, 3, dtype=dtype))
    assert not size <= torch.finfo(dtype).max


@given(st.floats(allow_nan=False, allow_infinity=False, width=64, min_value=-60000, max_value=60000), DTYPES)
@settings(max_examples=200, deadline=None)
def test_round_once_is_nearest_even(value: float, dtype: torch.dtype) -> None:
    result = lora.round_once(torch.tensor([value], dtype=torch.float64), dtype)
    assert Fraction(result.item()) == rounded(Fraction(value), dtype)


def test_round_once_does_not_round_twice() -> None:
    just_above_a_tie = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert lora.round_once(just_above_a_tie, torch.bfloat16).item() == 1 + 2**-7
    assert just_above_a_tie.to(torch.bfloat16).item() == 1  # what torch's own conversion makes of it


def test_delta_is_scale_b_a() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 5), torch.randn(4, 3)
    assert_close(lora.delta(a, b, 2.0), 2 * b @ a)
    assert lora.delta(a.bfloat16(), b.bfloat16(), 2.0).dtype == torch.float32


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_norm_and_inner_product_are_those_of_the_product(rows: int, columns: int, r1: int, r2: int, seed: int) -> None:
    torch.manual_seed(seed)
    a1, b1, a2, b2 = torch.randn(r1, columns), torch.randn(rows, r1), torch.randn(r2, columns), torch.randn(rows, r2)
    one, two = lora.delta(a1, b1, -1.5).double(), lora.delta(a2, b2, 0.5).double()
    assert lora.delta_norm(a1, b1, -1.5) == pytest.approx(one.norm().item(), rel=1e-5)
    assert lora.inner(a1, b1, -1.5, a2, b2, 0.5) == pytest.approx((one * two).sum().item(), rel=1e-4, abs=1e-5)


def test_shapes_are_checked() -> None:
    a, b = torch.ones(2, 5), torch.ones(4, 3)
    with pytest.raises(ShapeError, match="expected"):
        lora.delta(a, b, 1.0)
    with pytest.raises(ShapeError, match="update is 4×5, weight is"):
        lora.add_delta(torch.ones(5, 4), a, torch.ones(4, 2), 1.0)
    with pytest.raises(ShapeError, match="one module's shape"):
        lora.inner(a, torch.ones(4, 2), 1.0, a, torch.ones(3, 2), 1.0)


@pytest.mark.usefixtures("way")
@given(st.data(), DTYPES)
@settings(max_examples=60, deadline=None)
def test_blocks_of_one_tensor_each_get_their_own_update(data: st.DataObject, dtype: torch.dtype) -> None:
    """Fused experts: a grid of updates over the flattened tensor, met by the writer's blocks of rows anywhere."""
    experts, rows, columns, halves = (data.draw(st.integers(1, 4)) for _ in range(4))
    torch.manual_seed(rows)
    old = torch.randn(experts * rows, columns * halves + 1).to(dtype)  # the last column is in no block
    expected, blocks = old.clone(), []
    for i in range(experts):
        for j in range(halves):
            a, b = torch.randn(2, columns), torch.randn(rows, 2)
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            expected[block] = lora.add_delta(old[block].contiguous(), a, b, 0.7)
            blocks.append(sums.PlacedUpdate(sums.Update(a, b, 0.7), i * rows, j * columns))
    edit, out = sums.AddLora(*reversed(blocks)), torch.empty_like(old)
    step = data.draw(st.integers(1, len(old)))
    for row in range(0, len(old), step):
        part = out[row : row + step]
        size = edit.rows(old[row : row + step], row, part, lora.Scratch(part.numel()))
        assert size >= part.double().abs().max() * (1 - 2**-8)
    assert torch.equal(out, expected)
    assert torch.equal(lora.round_once(edit.exact(old.double()), dtype), expected)


def test_what_is_in_no_block_is_checked_too() -> None:
    edit, out = sums.AddLora(sums.PlacedUpdate(sums.Update(torch.ones(1, 1), torch.ones(1, 1), 1.0))), torch.empty(2, 2)
    old = torch.tensor([[1.0, 1.0], [1.0, math.nan]])
    assert math.isnan(edit.rows(old, 0, out, lora.Scratch(4)))


@pytest.mark.parametrize(("row", "column", "fits"), [(0, 3, True), (2, 0, True), (1, 2, False), (0, 0, False)])
def test_updates_of_the_same_weights_are_refused(row: int, column: int, fits: bool) -> None:
    update = sums.Update(torch.ones(1, 3), torch.ones(2, 1), 1.0)
    with contextlib.nullcontext() if fits else pytest.raises(ShapeError, match="two updates of one tensor overlap"):
        sums.AddLora(sums.PlacedUpdate(update), sums.PlacedUpdate(update, row, column))
    with pytest.raises(ShapeError, match="update reaches column 4, the tensor has 3"):
        sums.AddLora(sums.PlacedUpdate(update, 0, 1)).rows(torch.ones(2, 3), 0, torch.ones(2, 3), lora.Scratch(6))
