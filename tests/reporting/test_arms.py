"""Recovery, pairing and flips."""

from __future__ import annotations

import pytest

from portllm.errors import DataError
from portllm.params import ReportParams
from portllm.reporting.findings import arms

PARAMS = ReportParams(bootstrap_samples=200)


@pytest.mark.parametrize(
    ("base", "ported", "retuned", "expected"),
    [
        (0.5, 0.9, 0.9, 1.0),
        (0.5, 0.7, 0.9, 0.5),
        (0.5, 0.5, 0.9, 0.0),
        (0.5, 0.4, 0.9, -0.25),
        (0.5, 0.95, 0.9, 1.125),
        (0.5, 0.6, 0.51, None),  # re-tuning gained next to nothing
        (0.9, 0.9, 0.5, None),
        (0.5, None, 0.9, None),
        (0.5, 0.9, None, None),
    ],
)
def test_recovery(base: float, ported: float | None, retuned: float | None, expected: float | None) -> None:
    share = arms.recovery(base, ported, retuned)
    assert share == (None if expected is None else pytest.approx(expected))


def test_pairing_is_by_document_not_by_place() -> None:
    left = {0: True, 1: False, 2: True, 9: True}
    right = {2: True, 1: True, 0: False, 7: False}
    paired = arms.pair(left, right, PARAMS)
    assert paired is not None
    assert (paired.pairs, paired.wins, paired.losses, paired.difference) == (3, 1, 1, 0.0)
    assert arms.pair({0: True}, {1: True}, PARAMS) is None


def test_flips_count_both_ways_over_the_same_documents() -> None:
    flips = arms.flips({0: True, 1: True, 2: False, 3: False}, {0: False, 1: True, 2: True, 3: False})
    assert flips is not None
    assert (flips.negative, flips.positive) == (0.25, 0.25)
    assert arms.flips({0: True}, {1: True}) is None


def test_the_score_is_strict_match_before_accuracy_and_never_a_guess() -> None:
    assert arms.reported_metric("t", {"acc,none": 1.0, "exact_match,strict-match": 0.5}) == "exact_match,strict-match"
    assert arms.reported_metric("t", {"f1,none": 0.2, "acc,none": 1.0}) == "acc,none"
    with pytest.raises(DataError, match="t: no score to report; expected .* found f1,none"):
        arms.reported_metric("t", {"f1,none": 0.2})


@pytest.mark.parametrize("key", ["format,none", "format,strict-match"])
def test_the_share_of_valid_answers_is_found_whatever_the_filter(key: str) -> None:
    assert arms.valid_format({"acc,none": 0.5, key: 0.75}) == 0.75
    assert arms.valid_format({"acc,none": 0.5}) is None
