"""Sections on what was measured: the base probe, the arms, what each arm knows of the news."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from portllm.reporting import formats as f
from portllm.reporting import prose
from portllm.reporting.arms import LEAST_GAIN, Cell, Pairing, mean
from portllm.reporting.findings import Average, Findings
from portllm.reporting.knowledge import Knowledge
from portllm.reporting.layout import Entry, Section, Table, dagger, row, task_name
from portllm.reporting.names import ARM_NAMES, DAGGER


def probe(findings: Findings) -> Section:
    threshold = f.percent_sign(findings.probe_threshold, 0)
    rows = []
    for task in findings.tasks:
        known = [findings.probes.get(release, {}).get(task) for release in findings.releases]
        first = known[0]
        verdict = Entry(f.DASH) if first is None else Entry("known", "good")
        if task in findings.unknown_tasks:
            verdict = Entry(f"not known {DAGGER}", "bad")
        rows.append(row(task, *(f.percent(k) for k in known), verdict))
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


def arms(findings: Findings) -> Section:
    return Section(
        slug="arms",
        title="The arms, per task and release",
        reading=prose.ARMS,
        pictures=("arms",),
        tables=(
            *(_arm_table(findings, release) for release in findings.releases[1:]),
            _first_table(findings),
            *_other_metrics(findings),
        ),
        notes=(
            prose.ARMS_NOTE.format(least=f.points(LEAST_GAIN).lstrip("+")),
            _control_note(findings),
            *dagger(findings),
        ),
    )


ARM_HEAD = ("recovery", "ported − retuned [95%]", "p", "negative flips", "positive flips", "valid format")


def _arm_table(findings: Findings, release: str) -> Table:
    cells = findings.on(release)
    rows = [_arm_row(findings, cell) for cell in cells]
    average = findings.average(release)
    if len(cells) > 1:
        rows.append(_mean_row(findings, average))
    return Table(
        caption=f"{release}: patches of {findings.first} ported onto it",
        head=("task", "base", f"tuned ({findings.first})", "ported", "retuned", *ARM_HEAD),
        rows=tuple(rows),
    )


def _arm_row(findings: Findings, cell: Cell) -> tuple[Entry, ...]:
    pairing, flips = cell.against_retuned, cell.flips
    return row(
        task_name(findings, cell.task),
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
    # near re-tuning is good news only where re-tuning gained something
    near = cell.within and cell.recovery is not None
    tone = "bad" if below else "good" if near else ""
    return Entry(f.percent(ported), tone)


def _formats(cell: Cell) -> str:
    """The lowest share among the arms."""
    valid = [score.format for score in cell.scores.values() if score.format is not None]
    return f.percent(min(valid)) if valid else f.DASH


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
            row(
                task_name(findings, cell.task),
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


def _other_metrics(findings: Findings) -> Iterator[Table]:
    """What else the harness scored the tasks by; nothing where each has one score only."""
    first = {cell.task: cell.others for cell in findings.on(findings.first)}
    rows = [
        row(
            cell.release,
            task_name(findings, cell.task),
            metric,
            f.percent(values.get("base")),
            f.percent(first.get(cell.task, {}).get(metric, {}).get("tuned")),
            f.percent(values.get("ported")),
            f.percent(values.get("retuned")),
        )
        for release in findings.releases[1:]
        for cell in findings.on(release)
        for metric, values in sorted(cell.others.items())
    ]
    if rows:
        yield Table(
            caption="The same answers by the harness's other metrics (%)",
            head=("release", "task", "metric", "base", f"tuned ({findings.first})", "ported", "retuned"),
            rows=tuple(rows),
            labels=3,
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


def knowledge(findings: Findings) -> Section:
    places = dict.fromkeys((k.release, k.corpus) for k in findings.knowledge)
    later = [place for place in places if place[0] != findings.first]
    facts = any(k.recall for k in findings.knowledge)
    return Section(
        slug="knowledge",
        title="What each arm knows of the news",
        reading=prose.KNOWLEDGE if facts or not later else prose.SURPRISE,
        pictures=("knowledge",) if later else (),
        tables=tuple(
            table
            for release, corpus in later
            for table in (_knowledge_means(findings, release, corpus), _knowledge_table(findings, release, corpus))
        ),
    )


def _knowledge_means(findings: Findings, release: str, corpus: str) -> Table:
    here = [k for k in findings.knowledge if (k.release, k.corpus) == (release, corpus)]
    kinds = _kinds(here)
    rows = []
    for arm in dict.fromkeys(k.arm for k in here):
        group = [k for k in here if k.arm == arm]
        recalled = (f.percent(mean(k.recall.get(kind) for k in group)) for kind in kinds)
        patches = f.DASH if arm == "base" else str(len(group))
        rows.append(row(ARM_NAMES[arm], *recalled, f.number(mean(k.perplexity for k in group)), patches))
    return Table(
        caption=f"{release}, asked about {corpus}: {_asked(kinds)}, mean over patches",
        head=("arm", *_recall_head(kinds), "perplexity", "patches"),
        rows=tuple(rows),
    )


def _knowledge_table(findings: Findings, release: str, corpus: str) -> Table:
    here = [k for k in findings.knowledge if (k.release, k.corpus) == (release, corpus)]
    kinds = _kinds(here)
    return Table(
        caption=f"{release}, asked about {corpus}: {_asked(kinds)}, patch by patch",
        head=("arm", "patch for", *_recall_head(kinds), "perplexity"),
        rows=tuple(row(ARM_NAMES[k.arm], k.patch_task or f.DASH, *_known(k, kinds)) for k in here),
        labels=2,
        folded=True,
    )


def _asked(kinds: list[str]) -> str:
    return "recall in %" if kinds else "perplexity of unseen text"


def _kinds(rows: Iterable[Knowledge]) -> list[str]:
    return list(dict.fromkeys(kind for row in rows for kind in row.recall))


def _recall_head(kinds: Iterable[str]) -> list[str]:
    return [f"{kind} facts" for kind in kinds]


def _known(row: Knowledge, kinds: Iterable[str]) -> list[str]:
    return [*(f.percent(row.recall.get(kind)) for kind in kinds), f.number(row.perplexity)]
