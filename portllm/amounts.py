"""Bytes and seconds as short text for people: three digits and a unit, the same everywhere."""

from __future__ import annotations

SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
DURATIONS = (("days", 86_400.0), ("h", 3_600.0), ("min", 60.0), ("s", 1.0))
# a unit is used from this many of it on: 90 min rather than 1.5 h
FEWEST = {"days": 4.0, "h": 2.0, "min": 2.0, "s": 0.0}


def size(nbytes: float) -> str:
    """Return `nbytes` in the largest decimal unit that it fills: `14.5 GB`, `840 kB`, `0 B`."""
    unit, divisor = next((pair for pair in SIZES if nbytes >= pair[1]), SIZES[-1])
    return f"{nbytes:.0f} B" if unit == "B" else f"{_digits(nbytes / divisor)} {unit}"


def duration(seconds: float) -> str:
    """Return `seconds` in one unit: `45 s`, `90 min`, `23.0 h`, `12.5 days`."""
    unit, divisor = next(pair for pair in DURATIONS if seconds >= FEWEST[pair[0]] * pair[1])
    value = seconds / divisor
    return f"{value:.0f} {unit}" if unit in ("s", "min") else f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    """Return `value` with three digits; all digits of a number from 100 on."""
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{decimals}f}"
