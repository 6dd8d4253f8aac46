"""Numbers as a reader sees them; `–` stands for what is not known."""

from __future__ import annotations

from collections.abc import Sequence

DASH = "–"
MINUS = "−"


def percent(share: float | None, digits: int = 1) -> str:
    """0.8841 → `88.4`; the column's head or the sentence says %."""
    return DASH if share is None else signed_zero(f"{100 * share:.{digits}f}")


def percent_sign(share: float | None, digits: int = 1) -> str:
    """0.8841 → `88.4%`, for sentences."""
    return DASH if share is None else f"{percent(share, digits)}%"


def points(difference: float | None) -> str:
    """−0.0212 → `−2.1`, +0.02 → `+2.0`: percentage points."""
    if difference is None:
        return DASH
    text = signed_zero(f"{100 * difference:+.1f}")
    return text.lstrip("+") if float(text.replace(MINUS, "-")) == 0 else text


def interval(low: float, high: float) -> str:
    """`[−4.2, +0.0]` in points."""
    return f"[{points(low)}, {points(high)}]"


def number(value: float | None, digits: int = 2) -> str:
    """A plain number with fixed decimals."""
    return DASH if value is None else signed_zero(f"{value:.{digits}f}")


def significant(value: float | None, digits: int = 3) -> str:
    """A plain number with that many significant digits, never in scientific notation above 1e-4."""
    return DASH if value is None else f"{value:#.{digits}g}".rstrip(".").replace("-", MINUS)


def p_value(p: float | None) -> str:
    """Two decimals where that says enough, `<0.001` at the end."""
    if p is None:
        return DASH
    if p < 0.001:
        return "<0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def seconds(value: float | None) -> str:
    """`0.8 s`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    if value is None:
        return DASH
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 120:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: int | None) -> str:
    """Bytes in MiB or GiB."""
    if count is None:
        return DASH
    mib = count / 2**20
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def integer(count: int | None) -> str:
    """`20,971,520`."""
    return DASH if count is None else f"{count:,}"


def times(ratio: float | None) -> str:
    """`4.2×`, `120×`."""
    if ratio is None:
        return DASH
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def listing(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def signed_zero(text: str) -> str:
    """Minus signs as in print, none before a zero."""
    if text.startswith("-") and not text.strip("-0."):
        text = text[1:]
    return text.replace("-", MINUS)
