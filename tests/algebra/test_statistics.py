"""Laws of the paired statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portllm.algebra.statistics import bootstrap_difference, mcnemar_p, wilson


@given(st.integers(0, 500), st.integers(1, 500))
def test_wilson_holds_the_share_and_stays_a_share(right: int, total: int) -> None:
    right = min(right, total)
    low, high = wilson(right, total)
    assert 0.0 <= low <= right / total <= high <= 1.0


def test_wilson_solves_its_equation() -> None:
    # at each end p the observed share lies 1.96 standard errors of p away: Wilson's definition
    low, high = wilson(30, 80)
    for p in (low, high):
        assert abs(30 / 80 - p) / math.sqrt(p * (1 - p) / 80) == pytest.approx(1.959964, abs=1e-5)


def test_wilson_narrows_with_more_examples_and_knows_nothing_from_none() -> None:
    wide, narrow = wilson(8, 16), wilson(800, 1600)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (1, 9, 22 / 1024), (10, 0, 2 / 1024)],
)
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int, p: float) -> None:
    assert mcnemar_p(wins, losses) == pytest.approx(p)
    assert mcnemar_p(losses, wins) == mcnemar_p(wins, losses)


def test_mcnemar_of_thousands_of_pairs_does_not_overflow() -> None:
    assert 0.0 <= mcnemar_p(1000, 3000) < 1e-100
    assert mcnemar_p(2000, 2000) == 1.0


def test_bootstrap_is_repeatable_and_holds_the_difference() -> None:
    low, high = bootstrap_difference(10, 60, 30, samples=2000, seed=3)
    assert low < -0.2 < high < 0.0
    assert (low, high) == bootstrap_difference(10, 60, 30, samples=2000, seed=3)
    coarse = {bootstrap_difference(100, 600, 300, samples=20, seed=seed) for seed in range(5)}
    assert len(coarse) > 1


def test_bootstrap_agrees_with_resampling_row_by_row() -> None:
    rows = np.array([1] * 12 + [0] * 70 + [-1] * 18)
    draws = np.random.default_rng(0).integers(0, len(rows), size=(4000, len(rows)))
    expected = np.quantile(rows[draws].mean(axis=1), [0.025, 0.975])
    assert bootstrap_difference(12, 70, 18, samples=4000, seed=0) == pytest.approx(expected, abs=0.011)


def test_bootstrap_of_equal_answers_is_a_point_and_of_none_an_error() -> None:
    assert bootstrap_difference(0, 40, 0, samples=100, seed=0) == (0.0, 0.0)
    with pytest.raises(ValueError, match="no pairs"):
        bootstrap_difference(0, 0, 0, samples=100, seed=0)
