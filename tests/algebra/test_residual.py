"""The residual's norms against the matrices they never form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from portllm.algebra import residual
from portllm.algebra.residual import ScaledFactors, squared_patched


def factors(seed: int, rank: int, scaling: float, dtype: torch.dtype = torch.float32) -> ScaledFactors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 7, generator=generator), torch.randn(5, rank, generator=generator)
    return ScaledFactors(a.to(dtype), b.to(dtype), scaling)


def dense(one: ScaledFactors) -> Tensor:
    return one.scaling * one.b.double() @ one.a.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dot_is_the_dense_inner_product(dtype: torch.dtype) -> None:
    left, right = factors(0, 2, 2.0, dtype), factors(1, 3, -0.5, dtype)
    assert left.dot(right) == pytest.approx(float((dense(left) * dense(right)).sum()))
    assert left.dot(right) == pytest.approx(right.dot(left))


def test_minus_is_the_difference_of_the_updates_whatever_their_ranks() -> None:
    left, right = factors(0, 2, 2.0), factors(1, 3, 0.5)
    torch.testing.assert_close(dense(left.minus(right)), dense(left) - dense(right))
    gap = left.minus(right)
    assert gap.dot(gap) == pytest.approx(left.dot(left) - 2 * left.dot(right) + right.dot(right))


def test_a_patch_differs_from_itself_by_nothing() -> None:
    one = factors(0, 4, 2.0)
    gap = one.minus(one)
    assert gap.dot(gap) == pytest.approx(0.0, abs=1e-10 * one.dot(one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_norm_is_the_dense_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "BLOCK_ROWS", 2)
    torch.manual_seed(2)
    weight, patch = torch.randn(5, 7).to(dtype), factors(3, 2, 1.5)
    expected = float((weight.double() + dense(patch)).square().sum())
    assert squared_patched(weight, patch) == pytest.approx(expected, rel=1e-5)
