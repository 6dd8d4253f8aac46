"""Bytes and seconds have one form (issue 9: sizes and times were formatted in three places, by other thresholds)."""

from __future__ import annotations

import pytest

from portllm import amounts


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.00 kB"), (48_500_000, "48.5 MB"), (14_483_464_192, "14.5 GB"),
     (999_960_000_000, "1,000 GB"), (2.5e12, "2.50 TB"), (9_996_000, "10.0 MB")],
)  # fmt: skip
def test_size_has_three_digits_and_the_largest_unit(nbytes: float, text: str) -> None:
    assert amounts.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (119.0, "119 s"), (120.0, "2 min"), (5_400.0, "90 min"), (7_200.0, "2.00 h"), (82_800.0, "23.0 h"),
     (86_400.0 * 14, "14.0 days"), (86_400.0 * 400, "400 days")],
)  # fmt: skip
def test_duration_uses_a_unit_that_it_fills(seconds: float, text: str) -> None:
    assert amounts.duration(seconds) == text
