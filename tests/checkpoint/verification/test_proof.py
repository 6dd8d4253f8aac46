"""Comparing a written tensor with its float64 formula: bit for bit, but for what float64 itself cannot decide."""

from __future__ import annotations

import pytest
import torch

from portllm.algebra.lora import round_once
from portllm.checkpoint.verification.proof import TensorSample, first_difference, fitting

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def exact() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(16, 24, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_correctly_rounded_tensor_passes_and_every_neighbour_fails(dtype: torch.dtype, exact: torch.Tensor) -> None:
    new = round_once(exact, dtype)
    assert first_difference(new, exact, None) is None
    for at in (0, 17, exact.numel() - 1):
        for towards in (-torch.inf, torch.inf):
            moved = new.clone()
            moved.view(-1)[at] = torch.nextafter(new.view(-1)[at], torch.tensor(towards, dtype=dtype))
            assert first_difference(moved, exact, exact) == at


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_a_rounding_boundary_either_neighbour_passes(dtype: torch.dtype, exact: torch.Tensor) -> None:
    low = round_once(exact, dtype)
    high = torch.nextafter(low, torch.full_like(low, torch.inf))
    boundary = (low.double() + high.double()) / 2
    for value in (boundary, boundary * (1 + 2.0**-52), boundary * (1 - 2.0**-52)):
        assert first_difference(low, value, None) is None
        assert first_difference(high, value, None) is None
    inside = boundary + (high.double() - low.double()) / 64
    assert first_difference(high, inside, None) is None
    assert first_difference(low, inside, None) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_fails_even_where_the_formula_says_so(value: float, exact: torch.Tensor) -> None:
    exact[2, 3] = value
    assert first_difference(exact.float(), exact, None) == 2 * 24 + 3


def test_a_sample_is_all_when_it_is_large_enough() -> None:
    sizes = {"a": 3, "b": 9, "c": 9}
    assert TensorSample(3).choose(sizes) == TensorSample(1, everything=True).choose(sizes) == ["a", "b", "c"]
    assert TensorSample(1).choose(sizes) == ["b"]
    assert TensorSample(8).choose({}) == []


def test_only_what_memory_holds_is_computed() -> None:
    assert fitting({"a": 10, "b": 1000}, memory_bytes=4000) == {"a": 10}
