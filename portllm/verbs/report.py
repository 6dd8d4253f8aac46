"""report: tables and pictures of all arms, or of the costs, as Markdown and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm import reporting
from portllm.checkpoint.files.output import staged, staged_file
from portllm.checkpoint.record.records import dumps
from portllm.errors import OutputError
from portllm.params import Params
from portllm.reporting.rendering import exports


@dataclass(frozen=True, kw_only=True)
class ReportRecord:
    """Where the report was written, the paragraph at its top, and its numbers."""

    out: str
    metrics_path: str
    plots: str
    headline: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CostRecord:
    """Where the page of costs was written, the paragraph at its top, and the executions without a cost file."""

    out: str
    headline: str
    absent: tuple[str, ...]


def run(
    *,
    params: Params,
    models: Path,
    evaluated: Path,
    out: Path,
    metrics: Path,
    plots: Path,
    force: bool = False,
    on_note: Callable[[str], object] = lambda _: None,
) -> ReportRecord:
    """Write `out`/report.{md,html} and pictures, `metrics` (JSON) and `plots`/*.csv, each complete or not at all.

    Reads models/{releases,patches} and `evaluated`/<release>.json with samples, of the tasks and releases that `params`
    names; a note names the others on disk. The same inputs give the same bytes.
    Raises DataError for missing or wrong inputs, OutputError where an output may not be written.
    """
    if orphans := reporting.orphans(params=params, models=models, evaluated=evaluated):
        names = ", ".join(map(str, orphans))
        on_note(f"left out, since `tasks` and `releases` of params.yaml do not name them: {names}; remove or add them")
    results = reporting.read(params=params, models=models, evaluated=evaluated)
    findings = reporting.find(results, params=params, models=models)
    numbers = exports.metrics(findings)
    with staged(out, force=force, inputs=(models, evaluated)) as folder:
        reporting.report_page(findings).write(folder)
    with staged(plots, force=force, inputs=(models, evaluated)) as folder:
        for name, rows in exports.plots(findings).items():
            exports.write_csv(folder / name, rows)
    with staged_file(metrics) as partial:
        partial.write_text(dumps(numbers), encoding="utf-8")
    return ReportRecord(
        out=str(out),
        metrics_path=str(metrics),
        plots=str(plots),
        headline=reporting.paragraph(findings),
        metrics=numbers,
    )


def run_costs(*, params: Params, costs: Path, out: Path, force: bool = False) -> CostRecord:
    """Write `out`/report.{md,html} and a picture of what the cost files below `costs` contain, complete or not at all.

    Raises DataError where there is no cost file or a wrong one, OutputError where `out` may not be written.
    """
    if costs.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{out}: contains the cost files of {costs}; choose another directory")
    findings = reporting.find_costs(reporting.read_costs(costs), params)
    page = reporting.cost_page(findings)
    with staged(out, force=force) as folder:
        page.write(folder)
    return CostRecord(out=str(out), headline=" ".join(page.headline), absent=tuple(map(str, findings.absent)))
