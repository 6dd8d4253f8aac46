"""doctor: what an experiment needs, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portllm import params
from portllm.cli.options import JSON, PARAMS
from portllm.cli.running import answer

if TYPE_CHECKING:
    from portllm.lm.sizing.needs import Need
    from portllm.verbs.doctor import Diagnosis

MARKS = {"ok": "ok  ", "warn": "note", "fail": "FAIL"}


@click.command(short_help="What an experiment needs, and whether this machine has it.")
@PARAMS
@click.option("--as-if", metavar="GPU", help="Estimate for this machine with such a GPU: H100, or A100:40 with its GB.")
@JSON
@click.pass_context
def doctor(ctx: click.Context, params_file: Path | None, as_if: str | None, as_json: bool) -> None:
    """What an experiment needs, stage by stage, and whether this machine has it; exit 1 if it has not.

    Disk follows from counts; memory and hours are estimates, and what they assume is printed. Without --params the
    machine alone is looked at.

    \b
    Examples:
      portllm doctor --params params.yaml
      portllm doctor --params profiles/mistral-7b.yaml --as-if H100
      portllm doctor --params profiles/mistral-7b.yaml --json
    """
    from portllm.verbs import doctor as verb

    found = verb.run(params=params.load(params_file) if params_file else None, as_if=as_if)
    answer(found.as_json(), as_json=as_json, line="\n".join(_lines(found)))
    if not found.able:
        ctx.exit(1)


def _lines(found: Diagnosis) -> Iterator[str]:
    for name, releases in _by_model(found).items():
        model = found.models[releases[0]]
        known = f"{model.parameters / 1e6:,.1f} M parameters, " if model.parameters else ""
        stored = f"{_size(model.stored_bytes)} of tensors " if model.stored_bytes else ""
        yield f"{', '.join(releases)}: {name}: {known}{stored}({model.origin})"
    if found.stages:
        yield ""
        yield f"{'stage':10}{'runs':>6}{'disk':>11}{'memory':>11}{'time':>11}"
        yield from (_row(stage) for stage in found.stages)
        totals = (_size(found.disk_bytes), _size(found.memory_bytes), _time(3600 * found.hours))
        yield f"{'in all':10}{'':>6}{totals[0]:>11}{totals[1]:>11}{totals[2]:>11}"
        yield f"to download: {_size(found.network_bytes)} of models, kept in the hub's cache (counted in all)"
        for stage in found.stages:
            if stage.unknown:
                yield f"not counted in {stage.stage}, as it is not known: {', '.join(stage.unknown)}"
        yield f"assumed: {'; '.join(found.assumptions)}"
        yield ""
    yield from (f"{MARKS[check.status]} {check.name}: {check.detail}" for check in found.checks)
    yield "packages: " + ", ".join(f"{name} {version or '–'}" for name, version in found.machine.packages.items())
    yield _verdict(found)


def _verdict(found: Diagnosis) -> str:
    if not found.able:
        return "This machine has not what it takes; see FAIL above."
    if found.stages:
        return "This machine has what it takes."
    why = "the size of a model is not known" if found.models else "no experiment was given (--params FILE)"
    return f"Nothing was estimated, as {why}; nothing was found that speaks against it."


def _by_model(found: Diagnosis) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for release, model in found.models.items():
        groups.setdefault(model.name, []).append(release)
    return groups


def _row(stage: Need) -> str:
    memory = _size(stage.memory_bytes) if stage.memory_bytes else ""
    disk = _size(stage.disk_bytes) if stage.disk_bytes else ""
    return f"{stage.stage:10}{stage.runs:>6}{disk:>11}{memory:>11}{_time(stage.seconds):>11}"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 5e7 else f"{count / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
