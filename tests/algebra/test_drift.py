"""Drift against its dense definition."""

from __future__ import annotations

import pytest
import torch

from portllm.algebra import drift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_equal_the_dense_ones(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "BLOCK_ELEMENTS", 7)  # several blocks, the last one short
    torch.manual_seed(0)
    old, new = torch.randn(5, 6).to(dtype), torch.randn(5, 6).to(dtype)
    assert drift.squared_norm(old) == pytest.approx(float(old.double().square().sum()), rel=1e-6)
    assert drift.squared_distance(new, old) == pytest.approx(
        float((new.double() - old.double()).square().sum()), rel=1e-6
    )


def test_distance_is_zero_to_itself_and_symmetric() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    assert drift.squared_distance(x, x) == 0.0
    assert drift.squared_distance(x, y) == drift.squared_distance(y, x) > 0


def test_a_long_sum_keeps_its_small_terms() -> None:
    # in fp32 a running sum of 2**24 ones would stop growing
    assert drift.squared_norm(torch.ones(2**24 + 8)) == 2**24 + 8


def test_shapes_must_agree_and_zero_has_no_drift() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        drift.squared_distance(torch.zeros(2, 3), torch.zeros(3, 2))
    assert drift.ratio(1.0, 0.0) is None
    assert drift.ratio(1.0, 4.0) == 0.5
