"""The section that sets our numbers beside published ones, and the one that says what is missing and why."""

from __future__ import annotations

from portllm.reporting import formats as f
from portllm.reporting import prose
from portllm.reporting.evidence import Cost
from portllm.reporting.findings import Findings
from portllm.reporting.layout import Entry, Section, Table, row
from portllm.reporting.paper import Price

ARMS = ("base", "ported", "retuned")


def section(findings: Findings) -> Section | None:
    """Published scores and prices beside ours; None where no paper tells of this model and these tasks."""
    known = findings.published
    if not (known.scores or known.price):
        return None
    return Section(
        slug="paper",
        title="Beside the papers",
        reading=prose.PUBLISHED,
        tables=(
            *((_scores(findings),) if known.scores else ()),
            *((_price(findings, known.price),) if known.price else ()),
        ),
    )


def absent(findings: Findings) -> Section | None:
    """One line for each section that is left out; None where all are there."""
    lines = []
    if not any(findings.probes.values()):
        lines.append(f"What the base knows before any patch: {_lower(prose.NO_PROBE)}")
    if not any(k.release != findings.first for k in findings.knowledge):
        lines.append(f"What each arm knows of the news: {_lower(prose.NO_NEWS)}")
    if findings.published.differences:
        lines.append(prose.NO_PAPER.format(how="; ".join(findings.published.differences)))
    if not lines:
        return None
    return Section(slug="absent", title="Left out", reading=prose.ABSENT, notes=tuple(lines))


def _scores(findings: Findings) -> Table:
    rows = []
    for task in dict.fromkeys(one.task for one in findings.published.scores):
        for one in findings.published.scores:
            if one.task == task:
                shares = (one.base, one.ported, one.retuned)
                rows.append(row(task, one.source, one.setting, *(f.percent(share, 2) for share in shares)))
        for cell in findings.cells:
            if cell.task == task and cell.release != findings.first:
                ours = [Entry(f.percent(cell.value(arm), 2)) for arm in ARMS]
                rows.append(row(task, "ours", f"{cell.release}, {cell.metric}", *ours))
    return Table(
        caption="Right answers on an updated release (%)",
        head=("task", "whose", "setting", *ARMS),
        rows=tuple(rows),
        labels=3,
    )


def _price(findings: Findings, price: Price) -> Table:
    rows = [
        row("LoRA training", price.source, f.integer(price.trained_parameters),
            f"{price.trained_memory_gigabytes:.2f} GB (all GPUs)", f"{price.trained_gpu_hours:.2f} h"),
        row("porting", price.source, "0",
            f"{price.ported_memory_gigabytes:.2f} GB (all GPUs)", f"{price.ported_gpu_hours:.4f} h"),
    ]  # fmt: skip
    for pair in findings.costs:
        if pair.task == price.task:
            rows += [
                _our_price("LoRA training", pair.release, pair.retune),
                _our_price("porting", pair.release, pair.port),
            ]
    return Table(
        caption=f"What a patch for {price.task} costs",
        head=("", "whose", "trainable parameters", "peak memory", "time"),
        rows=tuple(rows),
        labels=2,
    )


def _our_price(what: str, release: str, cost: Cost | None) -> tuple[Entry, ...]:
    if cost is None:
        return row(what, f"ours, {release}", *[f.DASH] * 3)
    memory = f"{f.size(cost.peak_rss_bytes)} (process)"
    if cost.peak_cuda_bytes:
        memory = f"{f.size(int(cost.peak_cuda_bytes))} (GPU)"
    return row(what, f"ours, {release}", f.integer(cost.trainable_parameters), memory, f.seconds(cost.wall_seconds))


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
