"""Sections that set the scores in context: drift, the residual, training curves, published scores, what is left out."""

from __future__ import annotations

from portllm.reporting.findings.summary import Findings
from portllm.reporting.findings.weights import Drift
from portllm.reporting.sections import formats as f
from portllm.reporting.sections.elements import Section, Table, row, task_name
from portllm.reporting.sections.measurements import NO_NEWS, NO_PROBE

DRIFT = (
    "Drift is ‖θ' − θ‖ / ‖θ‖ (Frobenius norm), per module and in all: how far a release's weights lie from an earlier "
    "one's. Large drift is a warning, not a verdict: there is no universal threshold, so read it beside the scores."
)
RESIDUAL = (
    "Re-tuning on the release gives Δ'; the port uses the old Δ and drops R = Δ' − Δ. ‖R‖/‖θ' + Δ‖ compares R with the "
    "whole model and is usually tiny because ‖θ'‖ is large. ‖R‖/‖Δ‖ compares R with the patch: 0 means the same patch, "
    "about 1.4 two unrelated ones of equal size. A port can work even then: parameter distance does not explain it."
)
TRAINING = (
    "Loss on the answers, per optimisation step. The curve of {first} is the patch that is ported; later releases' "
    "curves are the re-tuned references. A curve that does not fall means that there was no patch worth porting."
)
PUBLISHED = (
    "Figures of papers on the same task, beside ours where params.yaml keeps what we know of their patch settings; the "
    "rest (how a release was updated, above all) is our choice. Theirs were made with other data, versions and "
    "machines, some perhaps on another model: equal is not to be expected."
)
ABSENT = "Sections that had nothing to say."
NO_PAPER = "The papers' figures are left out, as the settings differ: {how}."
NO_DRIFT = "There is no later release to compare with the first."
NO_RESIDUAL = "No patch was re-tuned on a later release, so R is not known."
NO_TRAINING = "No training history was found."
PUBLISHED_ARMS = ("base", "ported", "retuned")
MOST_NAMES = 8  # of tensors that were not compared


def drift(findings: Findings) -> Section:
    """Return the section on how far each release's weights lie from earlier ones."""
    rows = tuple(row(d.release, d.against, f.percent(d.overall, 2), *_extremes(d)) for d in findings.drifts)
    outside = sorted({name for d in findings.drifts for name in d.not_compared})
    notes: tuple[str, ...] = () if rows else (NO_DRIFT,)
    if outside:
        more = f" and {len(outside) - MOST_NAMES} more" if len(outside) > MOST_NAMES else ""
        names = ", ".join(outside[:MOST_NAMES])
        notes += (f"Not compared (absent in one release, or of another shape): {names}{more}.",)
    return Section(
        slug="drift",
        title="How far the releases moved",
        reading=DRIFT,
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


def _extremes(drift: Drift) -> list[str]:
    ratios = sorted((m.drift_ratio, m.module) for m in drift.modules if m.drift_ratio is not None)
    if not ratios:
        return [f.DASH] * 4
    return [ratios[-1][1], f.percent(ratios[-1][0], 2), ratios[0][1], f.percent(ratios[0][0], 2)]


def residual(findings: Findings) -> Section:
    """Return the section on R = Δ' − Δ, which a port drops."""
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
        reading=RESIDUAL,
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
        notes=_unmeasured(findings),
    )


def _unmeasured(findings: Findings) -> tuple[str, ...]:
    if not findings.residuals and not findings.unmeasured:
        return (NO_RESIDUAL,)
    return tuple(f"Not measured on {u.release} for {u.task}: {u.reason}." for u in findings.unmeasured)


def training(findings: Findings) -> Section:
    """Return the section on the training losses."""
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
        reading=TRAINING.format(first=findings.first),
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
        notes=() if rows else (NO_TRAINING,),
    )


def published(findings: Findings) -> Section | None:
    """Return published scores next to ours; None where no paper has any of this model and these tasks."""
    if not findings.published.scores:
        return None
    return Section(
        slug="paper",
        title="Beside the papers",
        reading=PUBLISHED,
        tables=(_published_scores(findings),),
    )


def absent(findings: Findings) -> Section | None:
    """Return one line for each section that is left out; None where all are there."""
    lines = []
    if not any(findings.probes.values()):
        lines.append(f"What the base knows before any patch: {_lower(NO_PROBE)}")
    if not any(k.release != findings.first for k in findings.recalls):
        lines.append(f"What each arm knows of the news: {_lower(NO_NEWS)}")
    if findings.published.differences:
        lines.append(NO_PAPER.format(how="; ".join(findings.published.differences)))
    if not lines:
        return None
    return Section(slug="absent", title="Left out", reading=ABSENT, notes=tuple(lines))


def _published_scores(findings: Findings) -> Table:
    rows = []
    for task in dict.fromkeys(one.task for one in findings.published.scores):
        for one in findings.published.scores:
            if one.task == task:
                theirs = (one.base, one.ported, one.retuned)
                rows.append(row(task, one.source, one.setting, *(f.percent(share, 2) for share in theirs)))
        for ours in findings.comparisons:
            if ours.task == task and ours.release != findings.first:
                shares = (ours.value(arm) for arm in PUBLISHED_ARMS)
                setting = f"{ours.release}, {ours.metric}"
                rows.append(row(task, "ours", setting, *(f.percent(share, 2) for share in shares)))
    return Table(
        caption="Right answers on an updated release (%)",
        head=("task", "whose", "setting", *PUBLISHED_ARMS),
        rows=tuple(rows),
        labels=3,
    )


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
