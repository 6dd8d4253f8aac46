"""doctor: what an experiment needs, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portllm import params
from portllm.amounts import duration, size
from portllm.cli.options import JSON, PARAMS
from portllm.cli.running import answer

if TYPE_CHECKING:
    from portllm.verbs.doctor import Diagnosis

MARKS = {"ok": "ok  ", "warn": "note", "fail": "FAIL"}


@click.command(short_help="What an experiment needs, and whether this machine has it.")
@PARAMS
@click.option("--as-if", metavar="GPU", help="Estimate for this machine with such a GPU: H100, or A100:40 with its GB.")
@JSON
@click.pass_context
def doctor(ctx: click.Context, params_file: Path | None, as_if: str | None, as_json: bool) -> None:
    """What an experiment needs, stage by stage, and whether this machine has it; exit 1 if it has not.

    Disk follows from counts; memory and hours are estimates, and what they assume is printed. Hours are given only
    where the device's pace was measured, on this machine. Without --params only the machine is inspected.

    \b
    Examples:
      portllm doctor --params params.yaml
      portllm doctor --params profiles/mistral-7b.yaml --as-if H100
      portllm doctor --params profiles/mistral-7b.yaml --json
    """
    from portllm.verbs import doctor as verb

    diagnosis = verb.run(params=params.load(params_file) if params_file else None, as_if=as_if)
    answer(diagnosis.as_json(), as_json=as_json, line="\n".join(_lines(diagnosis)))
    if not diagnosis.able:
        ctx.exit(1)


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    for name, releases in _by_model(diagnosis).items():
        model = diagnosis.models[releases[0]]
        counted = f"{model.size.parameters / 1e6:,.1f} M parameters, " if model.size else ""
        stored = f"{size(model.stored_bytes)} of tensors " if model.stored_bytes else ""
        yield f"{', '.join(releases)}: {name}: {counted}{stored}({model.origin})"
    if diagnosis.stages:
        yield from _table(diagnosis)
    yield from (f"{MARKS[check.status]} {check.name}: {check.detail}" for check in diagnosis.checks)
    yield "packages: " + ", ".join(f"{name} {version or '–'}" for name, version in diagnosis.machine.packages.items())
    yield _verdict(diagnosis)


def _table(diagnosis: Diagnosis) -> Iterator[str]:
    seconds = None if diagnosis.hours is None else 3600 * diagnosis.hours
    yield ""
    yield f"{'stage':10}{'runs':>6}{'disk':>11}{'memory':>11}{'time':>11}"
    for stage in diagnosis.stages:
        yield _row(stage.stage, str(stage.runs), stage.disk_bytes, stage.memory_bytes, stage.seconds)
    yield _row("in all", "", diagnosis.disk_bytes, diagnosis.memory_bytes, seconds)
    yield f"to download: {size(diagnosis.network_bytes)} of models, kept in the hub's cache (counted in all)"
    for stage in diagnosis.stages:
        if stage.unknown:
            yield f"not counted in {stage.stage}, as it is not known: {', '.join(stage.unknown)}"
    yield f"assumed: {'; '.join(diagnosis.assumptions)}"
    yield ""


def _row(stage: str, runs: str, disk_bytes: int, memory_bytes: int, seconds: float | None) -> str:
    cells = (
        size(disk_bytes) if disk_bytes else "",
        size(memory_bytes) if memory_bytes else "",
        "–" if seconds is None else duration(seconds),
    )
    return f"{stage:10}{runs:>6}" + "".join(f"{cell:>11}" for cell in cells)


def _verdict(diagnosis: Diagnosis) -> str:
    if not diagnosis.able:
        return "This machine cannot run the experiment; see FAIL above."
    if diagnosis.stages:
        return "This machine can run the experiment."
    why = "the size of a model is not known" if diagnosis.models else "no experiment was given (--params FILE)"
    return f"Nothing was estimated, as {why}; no check failed."


def _by_model(diagnosis: Diagnosis) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for release, model in diagnosis.models.items():
        groups.setdefault(model.name, []).append(release)
    return groups
