"""report: tables and pictures of all arms, as Markdown and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.checkpoint.files.output import staged, staged_file
from portllm.checkpoint.record.records import dumps
from portllm.params import Params
from portllm.reporting import canvas, evidence, exports, pages, pictures, sections
from portllm.reporting.findings import Findings, find
from portllm.reporting.headline import paragraph


@dataclass(frozen=True, kw_only=True)
class ReportRecord:
    """Where the report went, the paragraph at its top, and its numbers."""

    out: str
    metrics_path: str
    plots: str
    headline: str
    metrics: Mapping[str, Any]


def run(
    *,
    params: Params,
    models: Path,
    evaluated: Path,
    costs: Path,
    out: Path,
    metrics: Path,
    plots: Path,
    force: bool = False,
    on_note: Callable[[str], object] = lambda _: None,
) -> ReportRecord:
    """Write `out`/report.{md,html} and pictures, `metrics` (JSON) and `plots`/*.csv, each whole or not at all.

    Reads models/{releases,patches}, `evaluated`/<release>.json with samples, and whatever is under `costs`, of the
    tasks and releases that `params` names; a note says what else is on the disk.
    Raises DataError for missing or wrong inputs, OutputError where an output may not be written.
    """
    if orphans := evidence.orphans(params=params, models=models, evaluated=evaluated):
        names = ", ".join(map(str, orphans))
        on_note(f"left out, since `tasks` and `releases` of params.yaml do not name them: {names}; remove or add them")
    seen = evidence.read(params=params, models=models, evaluated=evaluated, costs=costs)
    found = find(seen, params=params, models=models)
    numbers = exports.metrics(found)
    with staged(out, force=force, inputs=(models, evaluated, costs)) as folder:
        _write_pages(found, folder)
    with staged(plots, force=force, inputs=(models, evaluated, costs)) as folder:
        for name, rows in exports.plots(found).items():
            exports.write_csv(folder / name, rows)
    with staged_file(metrics) as partial:
        partial.write_text(dumps(numbers), encoding="utf-8")
    return ReportRecord(
        out=str(out), metrics_path=str(metrics), plots=str(plots), headline=paragraph(found), metrics=numbers
    )


def _write_pages(found: Findings, folder: Path) -> None:
    chapters, drawn = sections.build(found), pictures.draw(found)
    for name, svg in drawn.items():
        (folder / f"{name}.svg").write_text(canvas.as_file(svg), encoding="utf-8")
    (folder / "report.md").write_text(pages.markdown(found, chapters, drawn), encoding="utf-8")
    (folder / "report.html").write_text(pages.html(found, chapters, drawn), encoding="utf-8")
