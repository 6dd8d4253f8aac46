"""Drift as a heat map: layers down, kinds of module across, one panel per pair of releases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portllm.reporting import canvas
from portllm.reporting.formats import percent_sign
from portllm.reporting.weights import Drift

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.2
MANY_LAYERS = 12
# the order in which a layer computes; kinds not named here follow by name
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OUTSIDE = "outside layers"


def heat_map(drifts: Sequence[Drift]) -> Figure:
    """Every comparison as labelled cells on one colour scale; modules outside the layers in a row of their own."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values = [m.drift_ratio for d in drifts for m in d.modules if m.drift_ratio is not None]
    scale = ScalarMappable(norm=Normalize(0, 100 * max(values, default=1.0) or 1.0), cmap="Blues")
    heights = [1.35 + _cell_height(d) * (len(_layers(d)) + 1) for d in drifts]
    figure = canvas.new(WIDTH, sum(heights))
    panels: Any = figure.subplots(2 * len(drifts), 1, squeeze=False, height_ratios=_ratios(drifts))
    for i, drift in enumerate(drifts):
        _layered(panels[2 * i][0], drift, scale)
        _outside(panels[2 * i + 1][0], drift, scale)
    bar = figure.colorbar(
        scale, ax=list(panels.flat), shrink=min(1.0, 2.5 / sum(heights)), aspect=18, pad=0.02, anchor=(0.0, 1.0)
    )
    bar.set_label("drift (%)")
    bar.outline.set_visible(False)
    return figure


def _cell_height(drift: Drift) -> float:
    return 0.29 if len(_layers(drift)) <= MANY_LAYERS else 0.2


def _ratios(drifts: Sequence[Drift]) -> list[float]:
    return [float(n) for d in drifts for n in (max(1, len(_layers(d))), 1)]


def _layers(drift: Drift) -> list[int]:
    return sorted({m.layer for m in drift.modules if m.layer is not None})


def _layered(axes: Axes, drift: Drift, scale: Any) -> None:
    layers = _layers(drift)
    kinds = _kinds(drift)
    values = {(m.layer, m.kind): m.drift_ratio for m in drift.modules}
    grid = [[values.get((layer, kind)) for kind in kinds] for layer in layers]
    _cells(axes, grid, scale, columns=len(kinds))
    axes.set_title(f"{drift.release} against {drift.against}: {percent_sign(drift.overall, 2)} in all")
    axes.set_xticks([x + 0.5 for x in range(len(kinds))], [_broken(kind) for kind in kinds])
    axes.set_yticks([y + 0.5 for y in range(len(layers))], [f"layer {n}" for n in layers])


def _outside(axes: Axes, drift: Drift, scale: Any) -> None:
    modules = [m for m in drift.modules if m.layer is None]
    _cells(axes, [[m.drift_ratio for m in modules]], scale, columns=max(len(_kinds(drift)), len(modules)))
    axes.set_xticks([x + 0.5 for x in range(len(modules))], [_broken(m.kind.rpartition(".")[2]) for m in modules])
    axes.set_yticks([0.5], [OUTSIDE])


def _kinds(drift: Drift) -> list[str]:
    kinds = {m.kind for m in drift.modules if m.layer is not None}
    return sorted(kinds, key=lambda kind: (ORDER.index(kind) if kind in ORDER else len(ORDER), kind))


def _cells(axes: Axes, grid: list[list[float | None]], scale: Any, *, columns: int) -> None:
    """A cell per value with the value in it, on a grid `columns` wide; unknown ones are left empty."""
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value is not None:
                _cell(axes, x, y, 100 * value, scale, columns)
    axes.set_xlim(0, max(1, columns))
    axes.set_ylim(max(1, len(grid)), 0)
    axes.tick_params(labelsize=7.5 if columns > 9 else 8.5, pad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _cell(axes: Axes, x: int, y: int, value: float, scale: Any, columns: int) -> None:
    from matplotlib.patches import Rectangle

    colour = scale.to_rgba(value)
    axes.add_patch(Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, facecolor=colour, edgecolor=canvas.LINE, linewidth=0.5))
    luminance = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]
    text = axes.text(
        x + 0.5, y + 0.52, _short(value), ha="center", va="center", fontsize=7.5 if columns > 9 else 8.5,
        color="#101010" if luminance > 0.42 else "#ffffff",
    )  # fmt: skip
    text.set_in_layout(False)  # it lies inside its cell: measuring thousands of them would take most of the time


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if value >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.3f}"


def _broken(kind: str) -> str:
    """A long name over several lines."""
    return kind.replace("_", "\n")
