"""The sections of the page of costs: porting against re-tuning, every stage, published costs, what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from portllm.reporting.findings.costs import CostFindings, Execution
from portllm.reporting.findings.literature import PublishedCost
from portllm.reporting.results import Cost
from portllm.reporting.sections import formats as f
from portllm.reporting.sections.elements import Entry, Section, Table, row

COST = (
    "Seconds include starting the process and importing libraries; memory is the process's peak on this machine. On a "
    "small model starting up dominates both; the ratio grows with the model. Porting trains nothing and reads no data."
)
STAGES = (
    "Every stage with a cost file, added up. A stage that DVC restores from its cache writes no file: its seconds are "
    "of an earlier run, or absent."
)
PUBLISHED = "Costs of a paper on the same task, next to ours. Its machines, data and versions were others."
TRAINABLE = ("trainable when porting", "trainable when re-tuning")
MOST_NAMES = 12


def build_costs(findings: CostFindings) -> tuple[Section, ...]:
    """Return the sections of the page of costs in reading order, without those that are empty."""
    return (*_pairs(findings), _stages(findings), *_published(findings))


def cost_headline(findings: CostFindings) -> tuple[str, ...]:
    """Return what porting took against re-tuning, and which stages were not measured, in plain sentences."""
    executions = sum(stage.executions for stage in findings.stages)
    measured = f"{executions} of {executions + len(findings.absent)} executions of the pipeline's stages were measured"
    return (*_pace(findings), f"{measured}, each when it last ran on this machine.")


def _pace(findings: CostFindings) -> Iterator[str]:
    if (totals := findings.total_seconds) is None:
        return
    port, retune = totals
    if min(totals) <= 0:
        yield f"Porting took {f.seconds(port)} in all, re-tuning {f.seconds(retune)}."
        return
    ratio = f"{f.times(retune / port)} faster" if retune >= port else f"{f.times(port / retune)} slower"
    times = f"Porting took {f.seconds(port)} in all where re-tuning took {f.seconds(retune)}"
    yield f"{times}: {ratio}, with no training data."


def _pairs(findings: CostFindings) -> Iterator[Section]:
    rows = [
        row(
            p.release,
            p.task,
            f.seconds(p.port.wall_seconds if p.port else None),
            f.seconds(p.retune.wall_seconds if p.retune else None),
            f.times(p.speedup),
            f.size(p.port.peak_rss_bytes if p.port else None),
            f.size(p.retune.peak_rss_bytes if p.retune else None),
            f.integer(0 if p.port else None),
            f.integer(p.retune.trainable_parameters if p.retune else None),
        )
        for p in findings.pairs
    ]
    if not rows:
        return
    table = Table(
        caption="Porting against re-tuning",
        head=("release", "task", "port", "re-tune", "ratio", "port peak", "re-tune peak", *TRAINABLE),
        rows=(*rows, *_total(findings)),
        labels=2,
    )
    yield Section(slug="cost", title="What it costs", reading=COST, pictures=("cost",), tables=(table,))


def _total(findings: CostFindings) -> Iterator[tuple[Entry, ...]]:
    if (totals := findings.total_seconds) is not None:
        port, retune = totals
        ratio = f.times(retune / port) if port > 0 else f.DASH
        texts = ("all", "", f.seconds(port), f.seconds(retune), ratio, "", "", "", "")
        yield tuple(Entry(text, "total") for text in texts)


def _stages(findings: CostFindings) -> Section:
    rows = tuple(
        row(s.stage, f.integer(s.executions), f.seconds(s.wall_seconds), f.size(s.peak_rss_bytes))
        for s in findings.stages
    )
    table = Table(caption="All stages", head=("stage", "runs", "seconds in all", "largest peak"), rows=rows)
    notes = []
    if findings.absent:
        notes.append(f"Without a cost file: {_names(findings.absent)}.")
    if findings.unused:
        notes.append(f"Not counted, as params.yaml has no such task or release: {_names(findings.unused)}.")
    tables = (table,) if rows else ()
    return Section(slug="stages", title="What every stage took", reading=STAGES, tables=tables, notes=tuple(notes))


def _names(executions: Sequence[Execution]) -> str:
    more = f" and {len(executions) - MOST_NAMES} more" if len(executions) > MOST_NAMES else ""
    return ", ".join(map(str, executions[:MOST_NAMES])) + more


def _published(findings: CostFindings) -> Iterator[Section]:
    if (paper := findings.published) is None:
        return
    rows = [_paper_row("LoRA training", paper), _paper_row("porting", paper)]
    for pair in findings.pairs:
        if pair.task == paper.task:
            rows += [_our_row("LoRA training", pair.release, pair.retune), _our_row("porting", pair.release, pair.port)]
    table = Table(
        caption=f"What a patch for {paper.task} costs",
        head=("", "whose", "trainable parameters", "peak memory", "time"),
        rows=tuple(rows),
        labels=2,
    )
    yield Section(slug="paper", title="Published costs", reading=PUBLISHED, tables=(table,))


def _paper_row(step: str, paper: PublishedCost) -> tuple[Entry, ...]:
    parameters, gigabytes, hours = 0, paper.ported_memory_gigabytes, f"{paper.ported_gpu_hours:.4f} h"
    if step != "porting":
        parameters, gigabytes = paper.trained_parameters, paper.trained_memory_gigabytes
        hours = f"{paper.trained_gpu_hours:.2f} h"
    return row(step, paper.source, f.integer(parameters), f"{gigabytes:.2f} GB (all GPUs)", hours)


def _our_row(step: str, release: str, cost: Cost | None) -> tuple[Entry, ...]:
    if cost is None:
        return row(step, f"ours, {release}", *[f.DASH] * 3)
    memory = f"{f.size(cost.peak_rss_bytes)} (process)"
    if cost.peak_cuda_bytes:
        memory = f"{f.size(int(cost.peak_cuda_bytes))} (GPU)"
    return row(step, f"ours, {release}", f.integer(cost.trainable_parameters), memory, f.seconds(cost.wall_seconds))
