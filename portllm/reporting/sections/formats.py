"""Format numbers for a reader; `–` stands for an unknown value."""

from __future__ import annotations

from collections.abc import Sequence

DASH = "–"
MINUS = "−"


def percent(share: float | None, digits: int = 1) -> str:
    """Format 0.8841 as `88.4`; the column's head or the sentence has the %."""
    return DASH if share is None else signed_zero(f"{100 * share:.{digits}f}")


def percent_sign(share: float | None, digits: int = 1) -> str:
    """Format 0.8841 as `88.4%`, for sentences."""
    return DASH if share is None else f"{percent(share, digits)}%"


def points(difference: float | None) -> str:
    """Format −0.0212 as `−2.1` and +0.02 as `+2.0`: percentage points."""
    if difference is None:
        return DASH
    text = signed_zero(f"{100 * difference:+.1f}")
    return text.lstrip("+") if float(text.replace(MINUS, "-")) == 0 else text


def interval(low: float, high: float) -> str:
    """Format an interval of points as `[−4.2, +0.0]`."""
    return f"[{points(low)}, {points(high)}]"


def number(value: float | None, digits: int = 2) -> str:
    """Format a number with fixed decimals."""
    return DASH if value is None else signed_zero(f"{value:.{digits}f}")


def significant(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, above 1e-4 never in scientific notation."""
    return DASH if value is None else f"{value:#.{digits}g}".rstrip(".").replace("-", MINUS)


def p_value(p: float | None) -> str:
    """Format a probability with two decimals where that is enough, and as `<0.001` at the end."""
    if p is None:
        return DASH
    if p < 0.001:
        return "<0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def seconds(value: float | None) -> str:
    """Format seconds as `0.8 s`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    if value is None:
        return DASH
    if value < 9.95:
        return f"{value:.1f} s"
    rounded = round(value)
    if rounded < 120:
        return f"{rounded} s"
    minutes, rest = divmod(rounded, 60)
    if minutes < 120:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: int | None) -> str:
    """Format bytes in MiB or GiB."""
    if count is None:
        return DASH
    mib = count / 2**20
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def integer(count: int | None) -> str:
    """Format a count as `20,971,520`."""
    return DASH if count is None else f"{count:,}"


def times(ratio: float | None) -> str:
    """Format a ratio as `4.2×` or `120×`."""
    if ratio is None:
        return DASH
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def listing(names: Sequence[str]) -> str:
    """Join names as `a`, `a and b`, `a, b and c`."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def signed_zero(text: str) -> str:
    """Replace minus signs by those of print, and remove the one before a zero."""
    if text.startswith("-") and not text.strip("-0."):
        text = text[1:]
    return text.replace("-", MINUS)
