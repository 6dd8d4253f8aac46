"""Palette, markers and SVG of every picture.

Pictures are drawn once, in the light colours below. On the page those colours become CSS variables, so that
a dark page has its own; in a file next to report.md they stay as drawn, on an opaque ground.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct in every kind of colour blindness; marker shapes repeat the distinction.
# Each colour stands for one CSS variable of the page, so no two may be equal.
INK, MUTED, LINE, GROUND = "#1c2128", "#5b6470", "#d5dae0", "#fefefd"
ARM_COLOURS = {"base": "#7a828c", "tuned": "#d98e04", "ported": "#0072b2", "retuned": "#00896b", "old": "#c0609a"}
ARM_MARKERS = {"base": "o", "tuned": "D", "ported": "s", "retuned": "^", "old": "v"}
SERIES = ("#d98e05", "#0072b3", "#00896c", "#c0609b", "#b8500a", "#4a4fa8")
DASHES = ("-", (0, (5, 1.6)), (0, (1.6, 1.3)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))

VARIABLES = {
    INK: "--ink", MUTED: "--muted", LINE: "--line", GROUND: "--ground",
    **{colour: f"--arm-{arm}" for arm, colour in ARM_COLOURS.items()},
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
}  # fmt: skip

STYLE = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same letters on every machine
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": GROUND,
    "figure.edgecolor": "none",
    "savefig.facecolor": GROUND,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 6.5,
    "lines.markeredgewidth": 0.7,
    "svg.fonttype": "path",
    "svg.hashsalt": "portllm",  # ids from the content alone: the same numbers give the same file
}


def new(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches, with a layout in which nothing overlaps."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    room = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07, wspace=0.03, hspace=0.03)
    return Figure(figsize=(width, height), layout=room)


def quiet(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Draw hairlines along `grid` and nothing else."""
    axes.grid(axis=grid, color=LINE, linewidth=0.7)
    axes.tick_params(labelsize=8.5, pad=4)


def plain_log(axes: Axes, which: Literal["x", "y"], low: float, high: float) -> None:
    """Set a log scale from a little below `low` to a little above `high`, with a few plain numbers on it."""
    bottom, top = low / 1.5, high * 1.5
    steps = (1, 2, 5) if top / bottom < 120 else (1,)
    exponents = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    ticks = [t for t in (step * 10.0**e for e in exponents for step in steps) if bottom <= t <= top]
    labels = [f"{t:,.0f}" if t >= 1e4 else f"{t:g}" for t in ticks]
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(bottom, top)
        axes.set_xticks(ticks, labels)
        axes.set_xticks([], minor=True)
    else:
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.set_yticks(ticks, labels)
        axes.set_yticks([], minor=True)


def legend(figure: Figure, handles: Sequence[Any], *, columns: int = 5) -> None:
    """Draw one legend for the complete figure, above the panels."""
    figure.legend(
        handles=list(handles), loc="outside upper left", ncols=min(columns, len(handles)), handlelength=1.8,
        columnspacing=1.6, borderaxespad=0.2,
    )  # fmt: skip


def svg(figure: Figure) -> str:
    """Return the figure as an <svg> element without date, comment or version."""
    buffer = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue()
    return re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def as_file(drawn: str) -> str:
    """Return the element as the text of a file of its own, on an opaque ground."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + drawn


def inline(drawn: str, *, name: str, label: str) -> str:
    """Return the element for a page: the page's colours, its own ids (several share one page), and a spoken label."""
    text = drawn
    for colour, variable in VARIABLES.items():
        text = text.replace(f": {colour}", f": var({variable}, {colour})").replace(
            f'="{colour}"', f'="var({variable}, {colour})"'
        )
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
