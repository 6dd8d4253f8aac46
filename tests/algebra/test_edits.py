"""Laws of the edits: the formula of float64 rounded once, whatever the blocks; sizes that tell what was written."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from portllm.algebra import edits, initialisation, lora, sums

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
SLACK = 2.0**-44  # of float64: sums taken in another order


class Problem:
    """An old tensor, how to make an edit of it, and the formula of the new one, written here once more."""

    def __init__(self, old: Tensor, make: Callable[[], edits.Edit], formula: Tensor) -> None:
        self.old, self.make, self.formula = old, make, formula

    def __repr__(self) -> str:
        return f"{type(self.make()).__name__} of {tuple(self.old.shape)} {self.old.dtype}"


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Random tensors; every other time of few digits, so that sums often fall between two values of the dtype."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    few = draw(st.booleans())

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return ((values * 16).round() / 16 if few else values).to(dtype)

    rows, columns, rank = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    dtype, scale = draw(DTYPES), draw(st.sampled_from([1.0, 2.0, 0.5, 1 / 3]))
    old = tensor(rows, columns, dtype=dtype)
    kind = draw(st.sampled_from(["dora rows", "dora columns", "replace", "replace rows", "vector", "lora"]))
    if kind.startswith("dora"):
        a, b, axis = tensor(rank, columns), tensor(rows, rank), int(kind == "dora columns")
        # no output may be all zero: its direction is not defined
        magnitude, old = tensor(rows if axis == 0 else columns), old + torch.tensor(8.0, dtype=dtype)
        total = old.double() + scale * b.double() @ a.double()
        norm = total.square().sum(dim=1 - axis, keepdim=True).sqrt()
        new = total / norm * magnitude.double().unsqueeze(1 - axis)
        return Problem(old, lambda: edits.Dora(a, b, scale, magnitude, outputs=axis), new)
    if kind == "replace":
        values = tensor(rows, columns)
        read = lambda row, count: values[row:] if count < 0 else values[row : row + count]  # noqa: E731
        return Problem(old, lambda: edits.Replace(read), values.double())
    if kind == "replace rows":
        chosen = {row: tensor(columns) for row in range(rows) if draw(st.booleans())}
        new = torch.stack([chosen.get(row, old[row]).double() for row in range(rows)])
        return Problem(old, lambda: edits.ReplaceRows(chosen), new)
    if kind == "vector":
        step = tensor(columns)
        return Problem(old[:1], lambda: edits.AddVector(step, scale), old[:1].double() + scale * step.double())
    a, b = tensor(rank, columns), tensor(rows, rank)
    new = old.double() + scale * b.double() @ a.double()
    return Problem(old, lambda: sums.AddLora(sums.PlacedUpdate(sums.Update(a, b, scale))), new)


def run(edit: edits.Edit, old: Tensor, cuts: list[int]) -> tuple[Tensor, float]:
    """What the writer does with an edit: every block surveyed, then every block written; and the largest size told."""
    ends = [0, *sorted({cut for cut in cuts if 0 < cut < len(old)}), len(old)]
    blocks, scratch = list(pairwise(ends)), lora.Scratch(old.numel())
    if edit.surveys:
        for start, stop in blocks:
            edit.survey(old[start:stop], start, scratch)
    out = torch.empty_like(old)
    sizes = [edit.rows(old[start:stop], start, out[start:stop], scratch) for start, stop in blocks]
    return out, max(sizes) if all(size == size for size in sizes) else float("nan")


def between(value: Tensor, low: Tensor, high: Tensor) -> bool:
    return bool(((value >= low) & (value <= high)).all())


@given(problems(), st.lists(st.integers(1, 8)))
@settings(max_examples=250, deadline=None)
def test_an_edit_is_its_formula_rounded_once(problem: Problem, cuts: list[int]) -> None:
    out, size = run(problem.make(), problem.old, cuts)
    slack = SLACK * problem.formula.abs().max()
    low, high = (lora.round_once(problem.formula + side * slack, out.dtype) for side in (-1, 1))
    assert between(out, low, high)
    assert lora.round_once(torch.tensor([size]).double(), out.dtype).item() >= out.abs().max().item()
    assert_close(problem.make().exact(problem.old.double()), problem.formula, rtol=1e-13, atol=1e-13)


@given(problems(), st.lists(st.integers(1, 8)), st.lists(st.integers(1, 8)))
@settings(max_examples=120, deadline=None)
def test_blocks_do_not_matter_beyond_the_order_of_a_sum(problem: Problem, cuts: list[int], others: list[int]) -> None:
    one, two = run(problem.make(), problem.old, cuts)[0], run(problem.make(), problem.old, others)[0]
    slack = SLACK * problem.formula.abs().max()
    tie = lora.round_once(problem.formula - slack, one.dtype) != lora.round_once(problem.formula + slack, one.dtype)
    assert torch.equal(one[~tie], two[~tie])  # where float64 itself leaves no doubt: the same bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("outputs", [0, 1])
def test_dora_gives_each_output_its_magnitude(outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    old, a, b = torch.randn(40, 30).to(dtype), torch.randn(3, 30), torch.randn(40, 3)
    magnitude = torch.rand(40 if outputs == 0 else 30) + 0.5
    out, _ = run(edits.Dora(a, b, 0.7, magnitude, outputs=outputs), old, [7, 8, 31])
    assert_close(out.double().norm(dim=1 - outputs), magnitude.double(), rtol=float(torch.finfo(dtype).eps), atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["old", "new"])
@pytest.mark.parametrize("kind", ["dora", "replace", "replace rows", "vector"])
def test_size_tells_of_values_that_are_not_numbers(kind: str, place: str, bad: float) -> None:
    old, values = torch.ones(1, 3), torch.ones(1, 3)
    (old if place == "old" else values)[0, 1] = bad
    if kind == "replace" and place == "old":
        return  # the old tensor is not read
    made = {
        "dora": edits.Dora(values, torch.ones(1, 1), 1.0, torch.ones(1), outputs=0),
        "replace": edits.Replace(lambda row, count: values),
        "replace rows": edits.ReplaceRows({0: values[0]}) if place == "new" else edits.ReplaceRows({}),
        "vector": edits.AddVector(values[0], 1.0),
    }
    size = run(made[kind], old, [])[1]
    assert not size <= torch.finfo(torch.float32).max


@pytest.mark.parametrize("kind", ["replace", "replace rows", "vector", "dora"])
def test_what_float16_cannot_hold_shows_in_the_size(kind: str) -> None:
    old, large = torch.ones(1, 3, dtype=torch.float16), torch.tensor([1.0, 7e4, 1.0])
    made = {
        "replace": edits.Replace(lambda row, count: large.unsqueeze(0)),
        "replace rows": edits.ReplaceRows({0: large}),
        "vector": edits.AddVector(large, 1.0),
        "dora": edits.Dora(torch.zeros(1, 3), torch.zeros(1, 1), 1.0, torch.tensor([3e5]), outputs=0),
    }
    assert not run(made[kind], old, [])[1] <= torch.finfo(torch.float16).max


@given(st.integers(2, 8), st.integers(2, 8), st.data(), st.sampled_from([1.0, 2.0, 0.25]), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_pissa_takes_out_the_best_approximation(
    rows: int, columns: int, data: st.DataObject, scale: float, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rank = data.draw(st.integers(1, min(rows, columns)))
    a, b = initialisation.pissa(weight, rank, scale)
    left = (weight - scale * b @ a).norm()
    # Eckart and Young: nothing of this rank comes nearer than the singular values that are left
    assert_close(left, torch.linalg.svdvals(weight)[rank:].norm(), rtol=1e-4, atol=1e-5)


@given(st.integers(2, 8), st.integers(2, 8), st.data(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_olora_starts_from_q_and_r(rows: int, columns: int, data: st.DataObject, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rank = data.draw(st.integers(1, min(rows, columns)))
    a, b = initialisation.olora(weight, rank, 2.0)
    assert_close(b.T @ b, torch.eye(rank), rtol=1e-4, atol=1e-5)
    assert_close(a.tril(-1), torch.zeros_like(a))
    # the first columns of the weight are made of the first columns of Q alone
    assert_close(b @ a[:, :rank], weight[:, :rank], rtol=1e-4, atol=1e-5)
