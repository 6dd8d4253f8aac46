"""Numbers as they are printed."""

from __future__ import annotations

from portllm.reporting.sections import formats as f


def test_unknown_is_a_dash_everywhere() -> None:
    for spell in (
        f.percent,
        f.percent_sign,
        f.points,
        f.number,
        f.significant,
        f.p_value,
        f.seconds,
        f.size,
        f.integer,
        f.times,
    ):
        assert spell(None) == "–"


def test_shares_and_points() -> None:
    assert f.percent(0.8841) == "88.4"
    assert f.percent_sign(-0.25, 0) == "−25%"
    assert f.percent(-0.0) == f.percent(-0.0001, 1) == "0.0"
    assert f.points(0.0123) == "+1.2"
    assert f.points(-0.0212) == "−2.1"
    assert f.points(0.0) == f.points(-0.0001) == "0.0"
    assert f.interval(-0.04, 0.01) == "[−4.0, +1.0]"


def test_probabilities_do_not_read_as_zero() -> None:
    assert f.p_value(1e-9) == "<0.001"
    assert f.p_value(0.0421) == "0.042"
    assert f.p_value(1.0) == "1.00"


def test_durations_and_sizes() -> None:
    assert [f.seconds(v) for v in (0.84, 9.96, 42, 119.4, 200, 180, 7500)] == [
        "0.8 s", "10 s", "42 s", "119 s", "3 min 20 s", "3 min", "2 h 5 min",
    ]  # fmt: skip
    assert f.size(300 * 2**20) == "300 MiB"
    assert f.size(3 * 2**29) == "1.5 GiB"
    assert f.integer(20971520) == "20,971,520"


def test_ratios_and_lists() -> None:
    assert f.times(4.21) == "4.2×"
    assert f.times(123.4) == "123×"
    assert f.significant(0.00123456) == "0.00123"
    assert f.significant(12.3456) == "12.3"
    assert f.listing([]) == ""
    assert f.listing(["a"]) == "a"
    assert f.listing(["a", "b", "c"]) == "a, b and c"
