"""The pictures of the report, one function each: scores, knowledge, training, cost. The heat map is in heatmap.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portllm.reporting import canvas
from portllm.reporting.arms import ARMS, Score
from portllm.reporting.canvas import ARM_COLOURS, ARM_MARKERS, GROUND, LINE
from portllm.reporting.evidence import Cost, Curve
from portllm.reporting.findings import Findings
from portllm.reporting.heatmap import heat_map
from portllm.reporting.knowledge import KINDS, Knowledge
from portllm.reporting.names import ARM_NAMES, DAGGER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.2
LONG_NAMES = 30  # characters that fit side by side under half a page
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
    """Every picture there is data for, as SVG elements by name."""
    import matplotlib as mpl

    makers: dict[str, tuple[bool, Callable[[Findings], Figure]]] = {
        "arms": (True, _arms),
        "knowledge": (
            any(k.release != findings.first and (k.recall or k.perplexity is not None) for k in findings.knowledge),
            _knowledge,
        ),
        "drift": (bool(findings.drifts), lambda found: heat_map(found.drifts)),
        "training": (any(c.steps for c in findings.curves), _training),
        "cost": (bool(findings.costs), _cost),
    }
    with mpl.rc_context(canvas.STYLE):
        return {name: canvas.svg(make(findings)) for name, (there, make) in makers.items() if there}


def _arms(findings: Findings) -> Figure:
    figure, panels = _panels(findings.tasks, height=2.15)
    drawn = [arm for arm in ARMS if any(arm in cell.scores for cell in findings.cells)]
    for i, (axes, task) in enumerate(zip(panels, findings.tasks, strict=True)):
        cells = {cell.release: cell.scores for cell in findings.cells if cell.task == task}
        for arm in drawn:
            here = [(x, cells[r]) for x, r in enumerate(findings.releases) if arm in cells[r]]
            _trace(axes, [(x + _shift(arm, scores), scores[arm]) for x, scores in here], arm, joined=findings.chain)
        if "tuned" in cells[findings.first]:
            level = 100 * cells[findings.first]["tuned"].value
            axes.axhline(level, color=ARM_COLOURS["tuned"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.set_title(task + (f" {DAGGER}" if task in findings.unknown_tasks else ""))
        axes.set_xticks(range(len(findings.releases)), findings.releases)
        if sum(map(len, findings.releases)) > LONG_NAMES:
            axes.tick_params(axis="x", labelrotation=20)
        axes.set_xlim(-0.5, len(findings.releases) - 0.5)
        axes.set_ylim(-3, 103)
        axes.set_yticks(range(0, 101, 25))
        axes.set_ylabel("right answers (%)" if i % 2 == 0 else "")
        canvas.quiet(axes, grid="y")
    canvas.legend(figure, [_handle(arm) for arm in drawn])
    return figure


def _shift(arm: str, scores: Mapping[str, Score]) -> float:
    """Where an arm stands beside its release's tick, so that equal scores do not hide each other."""
    there = [name for name in ARMS if name in scores]
    return 0.13 * (there.index(arm) - (len(there) - 1) / 2)


def _trace(axes: Axes, points: Sequence[tuple[float, Score]], arm: str, *, joined: bool) -> None:
    xs = [x for x, _ in points]
    ys = [100 * s.value for _, s in points]
    below = [max(0.0, 100 * (s.value - s.low)) for _, s in points]
    above = [max(0.0, 100 * (s.high - s.value)) for _, s in points]
    colour = ARM_COLOURS[arm]
    axes.errorbar(xs, ys, yerr=[below, above], color=colour, linestyle="none", elinewidth=1.1, capsize=2, zorder=3)
    line = 1.1 if joined else 0.0  # releases side by side are no course of time
    axes.plot(xs, ys, color=colour, marker=ARM_MARKERS[arm], markeredgecolor=GROUND, linewidth=line, zorder=3)


def _knowledge(findings: Findings) -> Figure:
    rows = [k for k in findings.knowledge if k.release != findings.first]
    places = list(dict.fromkeys((k.release, k.corpus) for k in rows))
    kinds = [kind for kind in KINDS if any(kind in k.recall for k in rows)]
    columns: list[tuple[str, Callable[[Knowledge], float | None]]] = [
        (f"{kind} facts (%)", _recaller(kind)) for kind in kinds
    ]
    if any(k.perplexity is not None for k in rows):
        columns.append(("perplexity", lambda row: row.perplexity))
    patches = [t for t in findings.tasks if any(k.patch_task == t for k in rows)]
    height = 0.6 + len(places) * (0.65 + 0.3 * max(1, len(patches)))
    figure = canvas.new(WIDTH, height)
    grid: Any = figure.subplots(len(places), len(columns), squeeze=False, sharey=True, sharex="col")
    for i, (release, corpus) in enumerate(places):
        here = [k for k in rows if (k.release, k.corpus) == (release, corpus)]
        for axes, (title, value) in zip(grid[i], columns, strict=True):
            _knowers(axes, here, patches, value)
            axes.set_title(title if i == 0 else "", loc="center", fontsize=9, fontweight="normal")
            _scale(axes, rows, title, value)
            canvas.quiet(axes, grid="x")
        grid[i][0].set_ylabel(release if corpus.endswith(release) else f"{release} on {corpus}", fontweight="bold")
    arms = [arm for arm in ("old", "ported", "retuned") if any(k.arm == arm for k in rows)]
    canvas.legend(figure, [_bar_handle(), *(_handle(arm, linewidth=0) for arm in arms)])
    return figure


def _recaller(kind: str) -> Callable[[Knowledge], float | None]:
    def recalled(row: Knowledge) -> float | None:
        return None if kind not in row.recall else 100 * row.recall[kind]

    return recalled


def _knowers(
    axes: Axes, rows: Iterable[Knowledge], patches: Sequence[str], value: Callable[[Knowledge], float | None]
) -> None:
    shift = {"old": 0.2, "ported": 0.0, "retuned": -0.2}
    for row in rows:
        known = value(row)
        if known is None:
            continue
        if row.patch_task is None:
            axes.axvline(known, color=ARM_COLOURS["base"], linewidth=1.4, zorder=1)
        elif row.patch_task in patches:
            y = len(patches) - 1 - patches.index(row.patch_task) + shift.get(row.arm, 0.0)
            _dot(axes, known, y, row.arm)
    axes.set_yticks(range(len(patches)), list(reversed(patches)))
    axes.set_ylim(-0.6, max(0.6, len(patches) - 0.4))


def _dot(axes: Axes, x: float, y: float, arm: str) -> None:
    # an edge in the ground's colour keeps neighbours apart where they overlap
    axes.plot(x, y, color=ARM_COLOURS[arm], marker=ARM_MARKERS[arm], markeredgecolor=GROUND, linestyle="none", zorder=3)


def _scale(axes: Axes, rows: Sequence[Knowledge], title: str, value: Callable[[Knowledge], float | None]) -> None:
    if title != "perplexity":
        axes.set_xlim(-6, 106)
        axes.set_xticks([0, 50, 100])
        return
    known = [v for v in map(value, rows) if v is not None]
    low, high = min(known), max(known)
    if low > 0 and high / low > 20:
        canvas.plain_log(axes, "x", low, high)
    else:
        axes.set_xlim(0, high * 1.1)


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
            canvas.plain_log(axes, "y", min(losses), max(losses))
        else:
            axes.set_ylim(0, max(losses) * 1.05)
        axes.set_xlim(left=0)
        axes.margins(x=0.02)
        axes.set_ylabel(("loss (log scale)" if wide else "loss") if i % 2 == 0 else "")
        axes.set_xlabel("step" if i >= len(tasks) - 2 else "")
        canvas.quiet(axes, grid="y")
    canvas.legend(figure, [_line_handle(i, name) for i, name in enumerate(findings.releases)])
    return figure


def _curve(axes: Axes, curve: Curve, place: int) -> None:
    colour, dash = _series(place)
    marker = "o" if len(curve.steps) == 1 else ""
    axes.plot(curve.steps, curve.losses, marker=marker, linewidth=1.4, color=colour, linestyle=dash)


def _cost(findings: Findings) -> Figure:
    rows = list(reversed(findings.costs))
    figure = canvas.new(WIDTH, 1.0 + 0.27 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    _dumbbells(left, [(_seconds(p.port), _seconds(p.retune)) for p in rows])
    _dumbbells(right, [(_peak(p.port), _peak(p.retune)) for p in rows])
    left.set_yticks(range(len(rows)), [f"{p.release}  {p.task}" for p in rows])
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.set_title("seconds (log scale)")
    right.set_title("peak memory, GiB (log scale)")
    canvas.legend(figure, [_handle("ported", "porting", linewidth=0), _handle("retuned", "re-tuning", linewidth=0)])
    return figure


def _dumbbells(axes: Axes, rows: Sequence[tuple[float | None, float | None]]) -> None:
    for y, (port, retune) in enumerate(rows):
        if port is not None and retune is not None:
            axes.plot([port, retune], [y, y], color=LINE, linewidth=2, zorder=1)
        for value, arm in ((port, "ported"), (retune, "retuned")):
            if value is not None:
                _dot(axes, value, y, arm)
    known = [v for row in rows for v in row if v is not None and v > 0]
    if known:
        canvas.plain_log(axes, "x", min(known), max(known))
    canvas.quiet(axes, grid="x")


def _seconds(cost: Cost | None) -> float | None:
    return cost.wall_seconds if cost else None


def _peak(cost: Cost | None) -> float | None:
    return cost.peak_rss_bytes / 2**30 if cost and cost.peak_rss_bytes else None


def _panels(names: Sequence[str], *, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per name, two side by side, axes shared."""
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure = canvas.new(WIDTH if columns == 2 else WIDTH / 1.6, 0.55 + height * rows)
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
    return canvas.SERIES[place % len(canvas.SERIES)], canvas.DASHES[place % len(canvas.DASHES)]
