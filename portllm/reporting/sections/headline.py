"""The paragraph at the top of the report, computed from the numbers: it reports failure where they do."""

from __future__ import annotations

from portllm.reporting.findings.arms import LEAST_GAIN, WITHIN, mean, share_kept
from portllm.reporting.findings.summary import Average, Findings
from portllm.reporting.sections.formats import listing, percent, percent_sign, points

# what share of re-tuning's gain a port must keep to be called a success, and to be called a partial one
CARRIED, PARTLY = 0.9, 0.5


def paragraph(findings: Findings) -> str:
    """Return verdict, scores per release, failures, recall and control, in plain sentences."""
    return " ".join(parts(findings))


def parts(findings: Findings) -> list[str]:
    """Return the paragraph in parts that can stand alone: the verdict, one per later release, then what limits it."""
    sentences = [verdict(findings), _where_trained(findings)]
    sentences += [_release(findings, findings.average(release)) for release in findings.releases[1:]]
    sentences += [_spaced(_unknown(findings), _control(findings))]
    return [sentence for sentence in sentences if sentence]


def _where_trained(findings: Findings) -> str:
    """Return the scores of the patches on the release they were trained on."""
    rows = [c for c in findings.on(findings.first) if "tuned" in c.scores]
    tuned, base = mean(c.value("tuned") for c in rows), mean(c.value("base") for c in rows)
    if tuned is None or base is None:
        return ""
    text = f"On {findings.first}, where they were made, the patches score {percent_sign(tuned)} on average"
    text += f" against {percent_sign(base)} for the bare base."
    weak = [c.task for c in rows if c.scores["tuned"].value - c.scores["base"].value < LEAST_GAIN]
    return _spaced(text, f"On {listing(weak)} the patch itself learnt nothing." if weak else "")


def _spaced(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def verdict(findings: Findings) -> str:
    """Return whether the patches carried over, judged by the mean recovery of each later release."""
    later = [findings.average(release) for release in findings.releases[1:]]
    if not later:
        return "There is only one release, so nothing could be ported yet."
    shares = [average.recovery for average in later if average.recovery is not None]
    flat = [a.release for a in later if a.recovery is None and a.retuned is not None]
    where = f"On {listing(flat)} re-tuning itself gains less than {percent(LEAST_GAIN, 0)} points on average"
    if not shares:
        return f"{where}: there was nothing to carry over." if flat else _without_reference(later)
    return _spaced(_judged(min(shares), max(shares)), f"{where}, so nothing can be said there." if flat else "")


def _judged(worst: float, best: float) -> str:
    low, high = percent_sign(worst, 0), percent_sign(best, 0)
    share = low if low == high else f"{low} to {high}"
    if worst >= CARRIED:
        return f"The old patches carried over without training: they kept {share} of re-tuning's gain."
    if worst >= PARTLY:
        return f"The old patches carried over in part: they kept {share} of re-tuning's gain."
    if best >= PARTLY:
        return f"The old patches carried over to some releases only, with {share} of re-tuning's gain."
    if best <= 0:
        return f"The old patches did not carry over: they kept nothing of re-tuning's gain ({share})."
    return f"The old patches did not carry over: they kept {share} of re-tuning's gain."


def _without_reference(later: list[Average]) -> str:
    gains = [a.ported - a.base for a in later if a.ported is not None and a.base is not None]
    if not gains:
        return "No patch was ported onto a later release, so nothing can be said about porting."
    if min(gains) > 0:
        return "The ported patches are above the bare release; there is no re-tuned patch to compare them with."
    return "The ported patches are not above the bare release everywhere; there is no re-tuned patch to compare with."


def _release(findings: Findings, average: Average) -> str:
    if average.ported is None:
        return f"On {average.release} no patch was ported."
    scores = f"On {average.release} the ported patches score {percent_sign(average.ported)} on average"
    if average.retuned is not None:
        scores += f" against {percent_sign(average.retuned)} retuned"
        scores += f" and {percent_sign(average.base)} for the bare release"
        close, near = sum(c.within is True for c in average.comparisons), percent(WITHIN, 0)
        scores += f"; {close} of {len(average.comparisons)} tasks are within {near} points of re-tuning"
    else:
        scores += f" against {percent_sign(average.base)} for the bare release"
    if average.negative_flips is not None:
        scores += f"; {percent_sign(average.negative_flips)} of the examples flipped from right to wrong"
    return _spaced(scores + ".", _failures(average), _knowledge(findings, average.release))


def _failures(average: Average) -> str:
    """Name the tasks that fell short, and those below the bare release; empty when none did."""
    short = [
        f"{c.task} ({points(c.scores['ported'].value - c.scores['retuned'].value)} points)"
        for c in average.comparisons
        if c.within is False
    ]
    below = [c.task for c in average.comparisons if c.scores["ported"].value < c.scores["base"].value]
    sentences = [f"It fell short of re-tuning on {listing(short)}."] if short else []
    if below:
        sentences.append(f"On {listing(below)} the ported patch is below the bare release: do not use it there.")
    return _spaced(*sentences)


def _knowledge(findings: Findings, release: str) -> str:
    kept = share_kept(findings.recalls, release, "ported")
    old = share_kept(findings.recalls, release, "old")
    if kept is None:
        return ""
    text = f"The ported models keep {percent_sign(kept)} of what {release} newly knows"
    return text + (f", the old tuned models know {percent_sign(old)} of it." if old is not None else ".")


def _unknown(findings: Findings) -> str:
    if not findings.unknown_tasks:
        return ""
    names = listing(findings.unknown_tasks)
    below = percent_sign(findings.probe_threshold, 0)
    return f"The base knows too little of what {names} asks about (probe below {below}): read those rows with care."


def _control(findings: Findings) -> str:
    if not findings.controls:
        return f"The control (a patch ported onto {findings.first}, its own base) was not measured."
    wrong = [f"{c.task} ({c.differing} of {c.pairs} answers differ)" for c in findings.controls if c.differing]
    if wrong:
        return (
            f"The control FAILS: on their own base {findings.first}, ported patches answer otherwise: {listing(wrong)}."
        )
    return f"The control holds: ported onto their own base {findings.first}, all patches answer exactly as before."
