"""The report as sections of tables and pictures, the same for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from portllm.reporting import formats as f
from portllm.reporting import prose
from portllm.reporting.arms import LEAST_GAIN, Cell, Pairing, mean
from portllm.reporting.findings import Average, Findings, total_seconds
from portllm.reporting.knowledge import Knowledge
from portllm.reporting.names import ARM_NAMES, DAGGER
from portllm.reporting.weights import Drift


@dataclass(frozen=True)
class Entry:
    """One cell of a table; `tone` is empty, `good`, `bad` or `total`."""

    text: str
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """`labels` leading columns are text (left), the rest are numbers (right)."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    labels: int = 1


@dataclass(frozen=True, kw_only=True)
class Section:
    """`reading` says in two lines how to read it; `pictures` names figures, drawn elsewhere."""

    slug: str
    title: str
    reading: str
    pictures: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


def build(findings: Findings) -> tuple[Section, ...]:
    """All sections in reading order."""
    makers = (_probe, _arms, _knowledge, _drift, _residual, _training, _cost)
    return tuple(make(findings) for make in makers)


def _row(*cells: str | Entry) -> tuple[Entry, ...]:
    return tuple(cell if isinstance(cell, Entry) else Entry(cell) for cell in cells)


def _name(findings: Findings, task: str) -> str:
    return task + (f" {DAGGER}" if task in findings.unknown_tasks else "")


def _dagger(findings: Findings) -> tuple[str, ...]:
    if not findings.unknown_tasks:
        return ()
    return (f"{DAGGER} The base probe of this task failed on {findings.first}; see the first section.",)


def _probe(findings: Findings) -> Section:
    threshold = f.percent_sign(findings.probe_threshold, 0)
    rows = []
    for task in findings.tasks:
        known = [findings.probes.get(release, {}).get(task) for release in findings.releases]
        first = known[0]
        verdict = Entry(f.DASH) if first is None else Entry("known", "good")
        if task in findings.unknown_tasks:
            verdict = Entry(f"not known {DAGGER}", "bad")
        rows.append(_row(task, *(f.percent(k) for k in known), verdict))
    notes = () if findings.probes.get(findings.first) else (prose.NO_PROBE,)
    return Section(
        slug="probe",
        title="What the base knows before any patch",
        reading=prose.PROBE.format(threshold=threshold, first=findings.first, dagger=DAGGER),
        tables=(
            Table(
                caption="Share of probes answered (%)",
                head=("task", *findings.releases, f"at {threshold} on {findings.first}"),
                rows=tuple(rows),
            ),
        ),
        notes=notes,
    )


def _arms(findings: Findings) -> Section:
    return Section(
        slug="arms",
        title="The arms, per task and release",
        reading=prose.ARMS,
        pictures=("arms",),
        tables=(*(_arm_table(findings, release) for release in findings.releases[1:]), _first_table(findings)),
        notes=(
            prose.ARMS_NOTE.format(least=f.points(LEAST_GAIN).lstrip("+")),
            _control_note(findings),
            *_dagger(findings),
        ),
    )


ARM_HEAD = ("recovery", "ported − re-tuned [95%]", "p", "negative flips", "positive flips", "valid format")


def _arm_table(findings: Findings, release: str) -> Table:
    cells = findings.on(release)
    rows = [_arm_row(findings, cell) for cell in cells]
    average = findings.average(release)
    if len(cells) > 1:
        rows.append(_mean_row(findings, average))
    return Table(
        caption=f"{release}: patches of {findings.first} ported onto it",
        head=("task", "base", f"tuned ({findings.first})", "ported", "re-tuned", *ARM_HEAD),
        rows=tuple(rows),
    )


def _arm_row(findings: Findings, cell: Cell) -> tuple[Entry, ...]:
    pairing, flips = cell.against_retuned, cell.flips
    return _row(
        _name(findings, cell.task),
        f.percent(cell.value("base")),
        f.percent(_tuned(findings, cell.task)),
        _ported(cell),
        f.percent(cell.value("retuned")),
        f.percent(cell.recovery, 0),
        Entry(_difference(pairing), "bad" if cell.within is False else ""),
        f.p_value(pairing.p_value if pairing else None),
        f.percent(flips.negative if flips else None),
        f.percent(flips.positive if flips else None),
        _formats(cell),
    )


def _difference(pairing: Pairing | None) -> str:
    if pairing is None:
        return f.DASH
    return f"{f.points(pairing.difference)} {f.interval(pairing.low, pairing.high)}"


def _ported(cell: Cell) -> Entry:
    ported, base = cell.value("ported"), cell.value("base")
    below = ported is not None and base is not None and ported < base
    tone = "bad" if below else "good" if cell.within else ""
    return Entry(f.percent(ported), tone)


def _formats(cell: Cell) -> str:
    valid = [cell.scores[arm].format for arm in ("base", "tuned", "ported", "retuned") if arm in cell.scores]
    if all(v is None for v in valid):
        return f.DASH
    return " · ".join(f.percent(v, 0) for v in valid)


def _tuned(findings: Findings, task: str) -> float | None:
    return next((c.value("tuned") for c in findings.on(findings.first) if c.task == task), None)


def _mean_row(findings: Findings, average: Average) -> tuple[Entry, ...]:
    cells = average.cells
    difference = mean(c.against_retuned.difference if c.against_retuned else None for c in cells)
    positive = mean(c.flips.positive if c.flips else None for c in cells)
    texts = (
        "mean" if len(cells) == len(findings.tasks) else f"mean of {len(cells)}",
        f.percent(average.base),
        f.percent(mean(_tuned(findings, c.task) for c in cells)),
        f.percent(average.ported),
        f.percent(average.retuned),
        f.percent(average.recovery, 0),
        f.points(difference),
        "",
        f.percent(average.negative_flips),
        f.percent(positive),
        "",
    )
    return tuple(Entry(text, "total") for text in texts)


def _first_table(findings: Findings) -> Table:
    differing = {c.task: c for c in findings.controls}
    rows = []
    for cell in findings.on(findings.first):
        control = differing.get(cell.task)
        said = Entry(f.DASH)
        if control:
            said = Entry(f"{control.differing} of {control.pairs}", "bad" if control.differing else "good")
        rows.append(
            _row(
                _name(findings, cell.task),
                *(f.percent(cell.value(arm)) for arm in ("base", "tuned", "ported")),
                said,
                _formats(cell),
            )
        )
    return Table(
        caption=f"{findings.first}: where the patches were made (ported is the control)",
        head=("task", "base", "tuned", "ported", "answers that differ", "valid format"),
        rows=tuple(rows),
    )


def _control_note(findings: Findings) -> str:
    if not findings.controls:
        return f"Control: not measured (no task has both a tuned and a ported arm on {findings.first})."
    wrong = [c.task for c in findings.controls if c.differing]
    if wrong:
        return f"Control FAILED on {f.listing(wrong)}: ported onto its own base, the patch does not answer as before."
    return (
        f"Control: ported onto {findings.first}, its own base, every patch gives the answers it gave before "
        f"({len(findings.controls)} of {len(findings.controls)} tasks)."
    )


def _knowledge(findings: Findings) -> Section:
    places = dict.fromkeys((k.release, k.corpus) for k in findings.knowledge)
    later = [place for place in places if place[0] != findings.first]
    return Section(
        slug="knowledge",
        title="What each arm knows of the news",
        reading=prose.KNOWLEDGE,
        pictures=("knowledge",) if later else (),
        tables=tuple(_knowledge_table(findings, release, corpus) for release, corpus in later),
        notes=() if later else (prose.NO_NEWS,),
    )


def _knowledge_table(findings: Findings, release: str, corpus: str) -> Table:
    here = [k for k in findings.knowledge if (k.release, k.corpus) == (release, corpus)]
    kinds = list(dict.fromkeys(kind for k in here for kind in k.recall))
    rows = [_row(ARM_NAMES[k.arm], k.patch_task or f.DASH, *_known(k, kinds)) for k in here]
    for arm in dict.fromkeys(k.arm for k in here):
        group = [k for k in here if k.arm == arm]
        if len(group) > 1:
            recalled = (f.percent(mean(k.recall.get(kind) for k in group)) for kind in kinds)
            perplexed = f.number(mean(k.perplexity for k in group))
            rows.append(tuple(Entry(text, "total") for text in (ARM_NAMES[arm], "mean", *recalled, perplexed)))
    return Table(
        caption=f"{release}, asked about {corpus} (recall in %)",
        head=("arm", "patch for", *(f"{kind} facts" if kind != "all" else "all facts" for kind in kinds), "perplexity"),
        rows=tuple(rows),
        labels=2,
    )


def _known(row: Knowledge, kinds: Iterable[str]) -> list[str]:
    return [*(f.percent(row.recall.get(kind)) for kind in kinds), f.number(row.perplexity)]


def _drift(findings: Findings) -> Section:
    rows = tuple(_row(d.release, d.against, f.percent(d.overall, 2), *_largest(d)) for d in findings.drifts)
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


def _residual(findings: Findings) -> Section:
    rows = tuple(
        _row(
            r.release,
            _name(findings, r.task),
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
        notes=() if rows else (prose.NO_RESIDUAL,),
    )


def _training(findings: Findings) -> Section:
    rows = tuple(
        _row(
            _name(findings, c.task),
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
            ),
        )
        if rows
        else (),
        notes=() if rows else (prose.NO_TRAINING,),
    )


TRAINS = ("trainable when porting", "trainable when re-tuning")


def _cost(findings: Findings) -> Section:
    rows = [
        _row(
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
        _row(s.stage, f.integer(s.executions), f.seconds(s.wall_seconds), f.size(s.peak_rss_bytes))
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
