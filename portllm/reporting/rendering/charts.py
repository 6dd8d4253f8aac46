"""Draw the pictures of the pages, one function each: scores, recall, drift (a heat map), training, costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portllm.reporting.findings.arms import ARMS, KINDS, Recall, ScoreEstimate
from portllm.reporting.findings.costs import CostFindings
from portllm.reporting.findings.summary import Findings
from portllm.reporting.findings.weights import Drift
from portllm.reporting.rendering import drawing
from portllm.reporting.rendering.drawing import ARM_COLOURS, ARM_MARKERS, GROUND, LINE
from portllm.reporting.results import Cost, TrainingCurve
from portllm.reporting.sections.elements import ARM_NAMES, DAGGER
from portllm.reporting.sections.formats import percent_sign

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.2
LONG_NAMES = 30  # characters that fit side by side under half a page
MANY_LAYERS = 12
# the order in which a layer computes; kinds not named here follow by name
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OUTSIDE = "outside layers"
LABELS = {
    "arms": "Share of right answers of each arm, release by release, with 95% intervals. "
    "The dashed line is what the patch scored where it was made.",
    "knowledge": "What each arm recalls of a release's facts and its perplexity on the release's text, per patch. "
    "The grey line is the bare release.",
    "drift": "Drift (%) of every module: layers down, kinds of module across.",
    "training": "Training loss of every patch, one line per release it was trained on.",
    "cost": "Seconds and peak memory of porting a patch and of re-tuning it.",
}


def draw(findings: Findings) -> dict[str, str]:
    """Return every picture of the report that there is data for, as SVG elements by name."""
    later = [row for row in findings.recalls if row.release != findings.first]
    charts: dict[str, Callable[[Findings], Figure]] = {"arms": _arms}
    if any(row.facts or row.perplexity is not None for row in later):
        charts["knowledge"] = _recalls
    if findings.drifts:
        charts["drift"] = lambda findings: heat_map(findings.drifts)
    if any(curve.steps for curve in findings.curves):
        charts["training"] = _training
    return _drawn({name: functools.partial(chart, findings) for name, chart in charts.items()})


def draw_costs(findings: CostFindings) -> dict[str, str]:
    """Return the picture of the page of costs by name; none where no port or re-tuning was measured."""
    return _drawn({"cost": lambda: _costs(findings)} if findings.pairs else {})


def _drawn(charts: Mapping[str, Callable[[], Figure]]) -> dict[str, str]:
    import matplotlib as mpl

    with mpl.rc_context(drawing.STYLE):
        return {name: drawing.svg(chart()) for name, chart in charts.items()}


def _arms(findings: Findings) -> Figure:
    figure, panels = _panels(findings.tasks, height=2.15)
    arms = [arm for arm in ARMS if any(arm in one.scores for one in findings.comparisons)]
    for i, (axes, task) in enumerate(zip(panels, findings.tasks, strict=True)):
        scores = {one.release: one.scores for one in findings.comparisons if one.task == task}
        for arm in arms:
            here = [(x, scores[r]) for x, r in enumerate(findings.releases) if arm in scores[r]]
            _trace(axes, [(x + _shift(arm, beside), beside[arm]) for x, beside in here], arm, joined=findings.chain)
        if "tuned" in scores[findings.first]:
            level = 100 * scores[findings.first]["tuned"].value
            axes.axhline(level, color=ARM_COLOURS["tuned"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.set_title(task + (f" {DAGGER}" if task in findings.unknown_tasks else ""))
        axes.set_xticks(range(len(findings.releases)), findings.releases)
        if sum(map(len, findings.releases)) > LONG_NAMES:
            axes.tick_params(axis="x", labelrotation=20)
        axes.set_xlim(-0.5, len(findings.releases) - 0.5)
        axes.set_ylim(-3, 103)
        axes.set_yticks(range(0, 101, 25))
        axes.set_ylabel("right answers (%)" if i % 2 == 0 else "")
        drawing.quiet(axes, grid="y")
    drawing.legend(figure, [_handle(arm) for arm in arms])
    return figure


def _shift(arm: str, scores: Mapping[str, ScoreEstimate]) -> float:
    """Return how far an arm is shifted from its release's tick, so that equal scores do not hide each other."""
    arms = [name for name in ARMS if name in scores]
    return 0.13 * (arms.index(arm) - (len(arms) - 1) / 2)


def _trace(axes: Axes, points: Sequence[tuple[float, ScoreEstimate]], arm: str, *, joined: bool) -> None:
    xs = [x for x, _ in points]
    ys = [100 * s.value for _, s in points]
    below = [max(0.0, 100 * (s.value - s.low)) for _, s in points]
    above = [max(0.0, 100 * (s.high - s.value)) for _, s in points]
    colour = ARM_COLOURS[arm]
    axes.errorbar(xs, ys, yerr=[below, above], color=colour, linestyle="none", elinewidth=1.1, capsize=2, zorder=3)
    line = 1.1 if joined else 0.0  # releases side by side are no course of time
    axes.plot(xs, ys, color=colour, marker=ARM_MARKERS[arm], markeredgecolor=GROUND, linewidth=line, zorder=3)


def _recalls(findings: Findings) -> Figure:
    rows = [k for k in findings.recalls if k.release != findings.first]
    places = list(dict.fromkeys((k.release, k.corpus) for k in rows))
    kinds = [kind for kind in KINDS if any(kind in k.facts for k in rows)]
    columns: list[tuple[str, Callable[[Recall], float | None]]] = [
        (f"{kind} facts (%)", _facts_of(kind)) for kind in kinds
    ]
    if any(k.perplexity is not None for k in rows):
        columns.append(("perplexity", lambda row: row.perplexity))
    patches = [t for t in findings.tasks if any(k.patch_task == t for k in rows)]
    height = 0.6 + len(places) * (0.65 + 0.3 * max(1, len(patches)))
    figure = drawing.new(WIDTH, height)
    grid: Any = figure.subplots(len(places), len(columns), squeeze=False, sharey=True, sharex="col")
    for i, (release, corpus) in enumerate(places):
        here = [k for k in rows if (k.release, k.corpus) == (release, corpus)]
        for axes, (title, value) in zip(grid[i], columns, strict=True):
            _recall_rows(axes, here, patches, value)
            axes.set_title(title if i == 0 else "", loc="center", fontsize=9, fontweight="normal")
            _scale(axes, rows, title, value)
            drawing.quiet(axes, grid="x")
        grid[i][0].set_ylabel(release if corpus.endswith(release) else f"{release} on {corpus}", fontweight="bold")
    arms = [arm for arm in ("old", "ported", "retuned") if any(k.arm == arm for k in rows)]
    drawing.legend(figure, [_bar_handle(), *(_handle(arm, linewidth=0) for arm in arms)])
    return figure


def _facts_of(kind: str) -> Callable[[Recall], float | None]:
    def recalled(row: Recall) -> float | None:
        return None if kind not in row.facts else 100 * row.facts[kind]

    return recalled


def _recall_rows(
    axes: Axes, rows: Iterable[Recall], patches: Sequence[str], value: Callable[[Recall], float | None]
) -> None:
    shift = {"old": 0.2, "ported": 0.0, "retuned": -0.2}
    for row in rows:
        share = value(row)
        if share is None:
            continue
        if row.patch_task is None:
            axes.axvline(share, color=ARM_COLOURS["base"], linewidth=1.4, zorder=1)
        elif row.patch_task in patches:
            y = len(patches) - 1 - patches.index(row.patch_task) + shift.get(row.arm, 0.0)
            _dot(axes, share, y, row.arm)
    axes.set_yticks(range(len(patches)), list(reversed(patches)))
    axes.set_ylim(-0.6, max(0.6, len(patches) - 0.4))


def _dot(axes: Axes, x: float, y: float, arm: str) -> None:
    # an edge in the ground's colour keeps neighbours apart where they overlap
    axes.plot(x, y, color=ARM_COLOURS[arm], marker=ARM_MARKERS[arm], markeredgecolor=GROUND, linestyle="none", zorder=3)


def _scale(axes: Axes, rows: Sequence[Recall], title: str, value: Callable[[Recall], float | None]) -> None:
    if title != "perplexity":
        axes.set_xlim(-6, 106)
        axes.set_xticks([0, 50, 100])
        return
    numbers = [v for v in map(value, rows) if v is not None]
    low, high = min(numbers), max(numbers)
    if low > 0 and high / low > 20:
        drawing.plain_log(axes, "x", low, high)
    else:
        axes.set_xlim(0, high * 1.1)


def heat_map(drifts: Sequence[Drift]) -> Figure:
    """Draw every drift as labelled squares on one colour scale: layers down, kinds of module across, one panel each.

    Modules outside the layers have a row of their own.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values = [m.drift_ratio for d in drifts for m in d.modules if m.drift_ratio is not None]
    scale = ScalarMappable(norm=Normalize(0, 100 * max(values, default=1.0) or 1.0), cmap="Blues")
    heights = [1.35 + _square_height(d) * (len(_layers(d)) + 1) for d in drifts]
    figure = drawing.new(WIDTH, sum(heights))
    panels: Any = figure.subplots(2 * len(drifts), 1, squeeze=False, height_ratios=_ratios(drifts))
    for i, drift in enumerate(drifts):
        _layered(panels[2 * i][0], drift, scale)
        _outside_layers(panels[2 * i + 1][0], drift, scale)
    bar = figure.colorbar(
        scale, ax=list(panels.flat), shrink=min(1.0, 2.5 / sum(heights)), aspect=18, pad=0.02, anchor=(0.0, 1.0)
    )
    bar.set_label("drift (%)")
    bar.outline.set_visible(False)
    return figure


def _square_height(drift: Drift) -> float:
    return 0.29 if len(_layers(drift)) <= MANY_LAYERS else 0.2


def _ratios(drifts: Sequence[Drift]) -> list[float]:
    return [float(n) for d in drifts for n in (max(1, len(_layers(d))), 1)]


def _layers(drift: Drift) -> list[int]:
    return sorted({m.layer for m in drift.modules if m.layer is not None})


def _layered(axes: Axes, drift: Drift, scale: Any) -> None:
    layers = _layers(drift)
    kinds = _layer_kinds(drift)
    values = {(m.layer, m.kind): m.drift_ratio for m in drift.modules}
    grid = [[values.get((layer, kind)) for kind in kinds] for layer in layers]
    _squares(axes, grid, scale, columns=len(kinds))
    axes.set_title(f"{drift.release} against {drift.against}: {percent_sign(drift.overall, 2)} in all")
    axes.set_xticks([x + 0.5 for x in range(len(kinds))], [_broken(kind) for kind in kinds])
    axes.set_yticks([y + 0.5 for y in range(len(layers))], [f"layer {n}" for n in layers])


def _outside_layers(axes: Axes, drift: Drift, scale: Any) -> None:
    modules = [m for m in drift.modules if m.layer is None]
    _squares(axes, [[m.drift_ratio for m in modules]], scale, columns=max(len(_layer_kinds(drift)), len(modules)))
    axes.set_xticks([x + 0.5 for x in range(len(modules))], [_broken(m.kind.rpartition(".")[2]) for m in modules])
    axes.set_yticks([0.5], [OUTSIDE])


def _layer_kinds(drift: Drift) -> list[str]:
    kinds = {m.kind for m in drift.modules if m.layer is not None}
    return sorted(kinds, key=lambda kind: (ORDER.index(kind) if kind in ORDER else len(ORDER), kind))


def _squares(axes: Axes, grid: list[list[float | None]], scale: Any, *, columns: int) -> None:
    """Draw a square per value with the value in it, on a grid `columns` wide; unknown values are left empty."""
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value is not None:
                _square(axes, x, y, 100 * value, scale, columns)
    axes.set_xlim(0, max(1, columns))
    axes.set_ylim(max(1, len(grid)), 0)
    axes.tick_params(labelsize=7.5 if columns > 9 else 8.5, pad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _square(axes: Axes, x: int, y: int, value: float, scale: Any, columns: int) -> None:
    from matplotlib.patches import Rectangle

    colour = scale.to_rgba(value)
    axes.add_patch(Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, facecolor=colour, edgecolor=drawing.LINE, linewidth=0.5))
    luminance = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]
    text = axes.text(
        x + 0.5, y + 0.52, _short(value), ha="center", va="center", fontsize=7.5 if columns > 9 else 8.5,
        color="#101010" if luminance > 0.42 else "#ffffff",
    )  # fmt: skip
    text.set_in_layout(False)  # it lies inside its square: measuring thousands of them would take most of the time


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if value >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.3f}"


def _broken(kind: str) -> str:
    """Break a long name over several lines."""
    return kind.replace("_", "\n")


def _training(findings: Findings) -> Figure:
    curves = [c for c in findings.curves if c.steps]
    tasks = [t for t in findings.tasks if any(c.task == t for c in curves)]
    figure, panels = _panels(tasks, height=1.95)
    losses = [v for c in curves for v in c.losses]
    wide = min(losses) > 0 and max(losses) / min(losses) > 50
    for i, (axes, task) in enumerate(zip(panels, tasks, strict=True)):
        for curve in (c for c in curves if c.task == task):
            _curve(axes, curve, findings.releases.index(curve.release))
        axes.set_title(task)
        if wide:
            drawing.plain_log(axes, "y", min(losses), max(losses))
        else:
            axes.set_ylim(0, max(losses) * 1.05)
        axes.set_xlim(left=0)
        axes.margins(x=0.02)
        axes.set_ylabel(("loss (log scale)" if wide else "loss") if i % 2 == 0 else "")
        axes.set_xlabel("step" if i >= len(tasks) - 2 else "")
        drawing.quiet(axes, grid="y")
    drawing.legend(figure, [_line_handle(i, name) for i, name in enumerate(findings.releases)])
    return figure


def _curve(axes: Axes, curve: TrainingCurve, place: int) -> None:
    colour, dash = _series(place)
    marker = "o" if len(curve.steps) == 1 else ""
    axes.plot(curve.steps, curve.losses, marker=marker, linewidth=1.4, color=colour, linestyle=dash)


def _costs(findings: CostFindings) -> Figure:
    rows = list(reversed(findings.pairs))
    figure = drawing.new(WIDTH, 1.0 + 0.27 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    _dumbbells(left, [(_seconds(p.port), _seconds(p.retune)) for p in rows])
    _dumbbells(right, [(_peak(p.port), _peak(p.retune)) for p in rows])
    left.set_yticks(range(len(rows)), [f"{p.release}  {p.task}" for p in rows])
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.set_title("seconds (log scale)")
    right.set_title("peak memory, GiB (log scale)")
    drawing.legend(figure, [_handle("ported", "porting", linewidth=0), _handle("retuned", "re-tuning", linewidth=0)])
    return figure


def _dumbbells(axes: Axes, rows: Sequence[tuple[float | None, float | None]]) -> None:
    for y, (port, retune) in enumerate(rows):
        if port is not None and retune is not None:
            axes.plot([port, retune], [y, y], color=LINE, linewidth=2, zorder=1)
        for value, arm in ((port, "ported"), (retune, "retuned")):
            if value is not None:
                _dot(axes, value, y, arm)
    positive = [v for row in rows for v in row if v is not None and v > 0]
    if positive:
        drawing.plain_log(axes, "x", min(positive), max(positive))
    drawing.quiet(axes, grid="x")


def _seconds(cost: Cost | None) -> float | None:
    return cost.wall_seconds if cost else None


def _peak(cost: Cost | None) -> float | None:
    return cost.peak_rss_bytes / 2**30 if cost and cost.peak_rss_bytes else None


def _panels(names: Sequence[str], *, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel per name, two side by side, axes shared."""
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure = drawing.new(WIDTH if columns == 2 else WIDTH / 1.6, 0.55 + height * rows)
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=False)
    panels = list(grid.flat)
    for spare in panels[len(names) :]:
        spare.set_visible(False)
    return figure, panels[: len(names)]


def _handle(arm: str, label: str | None = None, *, linewidth: float = 1.2) -> Any:
    from matplotlib.lines import Line2D

    label = label or ARM_NAMES[arm]
    return Line2D([], [], color=ARM_COLOURS[arm], marker=ARM_MARKERS[arm], linewidth=linewidth, label=label)


def _bar_handle() -> Any:
    from matplotlib.lines import Line2D

    # the bare release has no patch: it is one line across all rows
    return Line2D(
        [], [], color=ARM_COLOURS["base"], marker="|", markersize=11, markeredgewidth=1.4, linewidth=0, label="base"
    )


def _line_handle(place: int, label: str) -> Any:
    from matplotlib.lines import Line2D

    colour, dash = _series(place)
    return Line2D([], [], color=colour, linestyle=dash, linewidth=1.4, label=label)


def _series(place: int) -> tuple[str, Any]:
    return drawing.SERIES[place % len(drawing.SERIES)], drawing.DASHES[place % len(drawing.DASHES)]
