"""Sections on why and at what price: drift, the residual, training curves, cost."""

from __future__ import annotations

from portllm.reporting import formats as f
from portllm.reporting import prose
from portllm.reporting.findings import Findings, total_seconds
from portllm.reporting.layout import Entry, Section, Table, row, task_name
from portllm.reporting.weights import Drift


def drift(findings: Findings) -> Section:
    rows = tuple(row(d.release, d.against, f.percent(d.overall, 2), *_largest(d)) for d in findings.drifts)
    outside = sorted({name for d in findings.drifts for name in d.not_compared})
    notes: tuple[str, ...] = () if rows else (prose.NO_DRIFT,)
    if outside:
        more = f" and {len(outside) - 8} more" if len(outside) > 8 else ""
        notes += (f"Not compared (absent in one release, or of another shape): {', '.join(outside[:8])}{more}.",)
    return Section(
        slug="drift",
        title="How far the releases moved",
        reading=prose.DRIFT,
        pictures=("drift",) if findings.drifts else (),
        tables=(
            Table(
                caption="Drift (%)",
                head=("release", "against", "overall", "moved most", "drift", "moved least", "drift"),
                rows=rows,
                labels=2,
            ),
        )
        if rows
        else (),
        notes=notes,
    )


def _largest(drift: Drift) -> list[str]:
    known = sorted((m.drift_ratio, m.module) for m in drift.modules if m.drift_ratio is not None)
    if not known:
        return [f.DASH] * 4
    return [known[-1][1], f.percent(known[-1][0], 2), known[0][1], f.percent(known[0][0], 2)]


def residual(findings: Findings) -> Section:
    rows = tuple(
        row(
            r.release,
            task_name(findings, r.task),
            *(f.significant(v) for v in (r.patch_norm, r.retuned_norm, r.residual_norm, r.over_weights, r.over_patch)),
            f.number(r.cosine),
        )
        for r in findings.residuals
    )
    return Section(
        slug="residual",
        title="What the port drops",
        reading=prose.RESIDUAL,
        tables=(
            Table(
                caption="Norms over the adapted modules (Frobenius)",
                head=("release", "task", "‖Δ‖", "‖Δ'‖", "‖R‖", "‖R‖/‖θ' + Δ‖", "‖R‖/‖Δ‖", "cos(Δ, Δ')"),
                rows=rows,
                labels=2,
            ),
        )
        if rows
        else (),
        notes=_not_told(findings),
    )


def _not_told(findings: Findings) -> tuple[str, ...]:
    if not findings.residuals and not findings.unmeasured:
        return (prose.NO_RESIDUAL,)
    return tuple(f"Not measured on {u.release} for {u.task}: {u.reason}." for u in findings.unmeasured)


def training(findings: Findings) -> Section:
    rows = tuple(
        row(
            task_name(findings, c.task),
            c.release,
            f.integer(c.steps[-1]),
            f.significant(c.losses[0]),
            f.significant(c.losses[-1]),
            f.significant(min(c.losses)),
        )
        for c in findings.curves
        if c.steps
    )
    return Section(
        slug="training",
        title="How the patches were trained",
        reading=prose.TRAINING.format(first=findings.first),
        pictures=("training",) if rows else (),
        tables=(
            Table(
                caption="Training loss",
                head=("task", "release", "steps", "first", "last", "lowest"),
                rows=rows,
                labels=2,
                folded=True,
            ),
        )
        if rows
        else (),
        notes=() if rows else (prose.NO_TRAINING,),
    )


TRAINS = ("trainable when porting", "trainable when re-tuning")


def cost(findings: Findings) -> Section:
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
        for p in findings.costs
    ]
    if totals := total_seconds(findings.costs):
        port, retune = totals
        ratio = f.times(retune / port) if port > 0 else f.DASH
        texts = ("all", "", f.seconds(port), f.seconds(retune), ratio, "", "", "", "")
        rows.append(tuple(Entry(text, "total") for text in texts))
    stages = tuple(
        row(s.stage, f.integer(s.executions), f.seconds(s.wall_seconds), f.size(s.peak_rss_bytes))
        for s in findings.stages
    )
    return Section(
        slug="cost",
        title="What it costs",
        reading=prose.COST,
        pictures=("cost",) if findings.costs else (),
        tables=tuple(
            table
            for table in (
                Table(
                    caption="Porting beside re-tuning",
                    head=(*("release", "task", "port", "re-tune", "ratio", "port peak", "re-tune peak"), *TRAINS),
                    rows=tuple(rows),
                    labels=2,
                ),
                Table(caption="All stages", head=("stage", "runs", "seconds in all", "largest peak"), rows=stages),
            )
            if table.rows
        ),
        notes=() if findings.stages else (prose.NO_COST,),
    )
