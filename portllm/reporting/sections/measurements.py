"""Sections on what was measured: the base probe, the arms, what each arm recalls of the news."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from portllm.reporting.findings.arms import LEAST_GAIN, Comparison, Pairing, Recall, mean
from portllm.reporting.findings.summary import Average, Findings
from portllm.reporting.sections import formats as f
from portllm.reporting.sections.elements import ARM_NAMES, DAGGER, Entry, Section, Table, dagger, row, task_name

PROBE = (
    "Can the bare release recall the facts that a task asks about? Below {threshold} on {first} a patch has nothing to "
    "build on, so the task is marked {dagger} everywhere. That says nothing about porting, and the task stays in."
)
ARMS = (
    "base is the release alone; tuned, the patch where it was made; ported, the same patch put onto a later release "
    "without training; retuned, a new patch trained on that release, the costly reference. Recovery is the share of "
    "re-tuning's gain that the port keeps; a negative flip is an example that tuned got right and ported gets wrong."
)
ARMS_NOTE = (
    "Scores, recovery and flips in %; differences in percentage points with a 95% bootstrap interval over the test "
    "examples; p is McNemar's exact test on the same examples. Recovery is – where re-tuning gains less than {least} "
    "points. Valid format: share of answers in the expected form, of the worst arm. Intervals cover the "
    "choice of test examples, not the luck of training seeds."
)
KNOWLEDGE = (
    "A release brings changed and new facts; kept facts were true before. A good port knows the news as the bare "
    "release does, the old tuned model cannot. Perplexity is on unseen text about the release's facts: lower is better."
)
SURPRISE = (
    "Perplexity on text of the kind the release was made from, which it has not read: lower is better. A good port "
    "expects it as the bare release does, the old tuned model less."
)
NO_PROBE = "No probe was recorded when the base was made."
NO_NEWS = "No later release was asked about its own corpus."


def probe(findings: Findings) -> Section:
    """Return the section on the base probe: the shares of facts the bare releases recall."""
    threshold = f.percent_sign(findings.probe_threshold, 0)
    rows = []
    for task in findings.tasks:
        shares = [findings.probes.get(release, {}).get(task) for release in findings.releases]
        verdict = Entry(f.DASH) if shares[0] is None else Entry("known", "good")
        if task in findings.unknown_tasks:
            verdict = Entry(f"not known {DAGGER}", "bad")
        rows.append(row(task, *(f.percent(k) for k in shares), verdict))
    notes = () if findings.probes.get(findings.first) else (NO_PROBE,)
    return Section(
        slug="probe",
        title="What the base knows before any patch",
        reading=PROBE.format(threshold=threshold, first=findings.first, dagger=DAGGER),
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
    """Return the section on the arms: scores, recovery, differences, flips, the control."""
    return Section(
        slug="arms",
        title="The arms, per task and release",
        reading=ARMS,
        pictures=("arms",),
        tables=(
            *(_arm_table(findings, release) for release in findings.releases[1:]),
            _first_table(findings),
            *_other_metrics(findings),
        ),
        notes=(
            ARMS_NOTE.format(least=f.points(LEAST_GAIN).lstrip("+")),
            _control_note(findings),
            *dagger(findings),
        ),
    )


ARM_HEAD = ("recovery", "ported − retuned [95%]", "p", "negative flips", "positive flips", "valid format")


def _arm_table(findings: Findings, release: str) -> Table:
    rows = [_arm_row(findings, one) for one in findings.on(release)]
    average = findings.average(release)
    if len(rows) > 1:
        rows.append(_mean_row(findings, average))
    return Table(
        caption=f"{release}: patches of {findings.first} ported onto it",
        head=("task", "base", f"tuned ({findings.first})", "ported", "retuned", *ARM_HEAD),
        rows=tuple(rows),
    )


def _arm_row(findings: Findings, one: Comparison) -> tuple[Entry, ...]:
    pairing, flips = one.against_retuned, one.flips
    return row(
        task_name(findings, one.task),
        f.percent(one.value("base")),
        f.percent(_tuned(findings, one.task)),
        _ported(one),
        f.percent(one.value("retuned")),
        f.percent(one.recovery, 0),
        Entry(_difference(pairing), "bad" if one.within is False else ""),
        f.p_value(pairing.p_value if pairing else None),
        f.percent(flips.negative if flips else None),
        f.percent(flips.positive if flips else None),
        _formats(one),
    )


def _difference(pairing: Pairing | None) -> str:
    if pairing is None:
        return f.DASH
    return f"{f.points(pairing.difference)} {f.interval(pairing.low, pairing.high)}"


def _ported(one: Comparison) -> Entry:
    ported, base = one.value("ported"), one.value("base")
    below = ported is not None and base is not None and ported < base
    # near re-tuning is good news only where re-tuning gained something
    near = one.within and one.recovery is not None
    tone = "bad" if below else "good" if near else ""
    return Entry(f.percent(ported), tone)


def _formats(one: Comparison) -> str:
    """Format the lowest share of valid answers among the arms."""
    valid = [score.format for score in one.scores.values() if score.format is not None]
    return f.percent(min(valid)) if valid else f.DASH


def _tuned(findings: Findings, task: str) -> float | None:
    return next((c.value("tuned") for c in findings.on(findings.first) if c.task == task), None)


def _mean_row(findings: Findings, average: Average) -> tuple[Entry, ...]:
    rows = average.comparisons
    difference = mean(c.against_retuned.difference if c.against_retuned else None for c in rows)
    positive = mean(c.flips.positive if c.flips else None for c in rows)
    texts = (
        "mean" if len(rows) == len(findings.tasks) else f"mean of {len(rows)}",
        f.percent(average.base),
        f.percent(mean(_tuned(findings, c.task) for c in rows)),
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
    for one in findings.on(findings.first):
        control = differing.get(one.task)
        verdict = Entry(f.DASH)
        if control:
            verdict = Entry(f"{control.differing} of {control.pairs}", "bad" if control.differing else "good")
        rows.append(
            row(
                task_name(findings, one.task),
                *(f.percent(one.value(arm)) for arm in ("base", "tuned", "ported")),
                verdict,
                _formats(one),
            )
        )
    return Table(
        caption=f"{findings.first}: where the patches were made (ported is the control)",
        head=("task", "base", "tuned", "ported", "answers that differ", "valid format"),
        rows=tuple(rows),
    )


def _other_metrics(findings: Findings) -> Iterator[Table]:
    """Yield a table of lm-eval's other metrics; none where each task has one score only."""
    first = {one.task: one.other_metrics for one in findings.on(findings.first)}
    rows = [
        row(
            one.release,
            task_name(findings, one.task),
            metric,
            f.percent(values.get("base")),
            f.percent(first.get(one.task, {}).get(metric, {}).get("tuned")),
            f.percent(values.get("ported")),
            f.percent(values.get("retuned")),
        )
        for release in findings.releases[1:]
        for one in findings.on(release)
        for metric, values in sorted(one.other_metrics.items())
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
    """Return the section on what each arm recalls of the later releases' news."""
    places = dict.fromkeys((k.release, k.corpus) for k in findings.recalls)
    later = [place for place in places if place[0] != findings.first]
    facts = any(k.facts for k in findings.recalls)
    return Section(
        slug="knowledge",
        title="What each arm knows of the news",
        reading=KNOWLEDGE if facts or not later else SURPRISE,
        pictures=("knowledge",) if later else (),
        tables=tuple(
            table
            for release, corpus in later
            for table in (_recall_means(findings, release, corpus), _recall_table(findings, release, corpus))
        ),
    )


def _recall_means(findings: Findings, release: str, corpus: str) -> Table:
    here = [k for k in findings.recalls if (k.release, k.corpus) == (release, corpus)]
    kinds = _kinds(here)
    rows = []
    for arm in dict.fromkeys(k.arm for k in here):
        group = [k for k in here if k.arm == arm]
        shares = (f.percent(mean(k.facts.get(kind) for k in group)) for kind in kinds)
        patches = f.DASH if arm == "base" else str(len(group))
        rows.append(row(ARM_NAMES[arm], *shares, f.number(mean(k.perplexity for k in group)), patches))
    return Table(
        caption=f"{release}, asked about {corpus}: {_measure(kinds)}, mean over patches",
        head=("arm", *_recall_head(kinds), "perplexity", "patches"),
        rows=tuple(rows),
    )


def _recall_table(findings: Findings, release: str, corpus: str) -> Table:
    here = [k for k in findings.recalls if (k.release, k.corpus) == (release, corpus)]
    kinds = _kinds(here)
    return Table(
        caption=f"{release}, asked about {corpus}: {_measure(kinds)}, patch by patch",
        head=("arm", "patch for", *_recall_head(kinds), "perplexity"),
        rows=tuple(row(ARM_NAMES[k.arm], k.patch_task or f.DASH, *_recall_entries(k, kinds)) for k in here),
        labels=2,
        folded=True,
    )


def _measure(kinds: list[str]) -> str:
    return "recall in %" if kinds else "perplexity of unseen text"


def _kinds(rows: Iterable[Recall]) -> list[str]:
    return list(dict.fromkeys(kind for row in rows for kind in row.facts))


def _recall_head(kinds: Iterable[str]) -> list[str]:
    return [f"{kind} facts" for kind in kinds]


def _recall_entries(row: Recall, kinds: Iterable[str]) -> list[str]:
    return [*(f.percent(row.facts.get(kind)) for kind in kinds), f.number(row.perplexity)]
