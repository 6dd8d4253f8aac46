"""The paragraph at the top, computed from the numbers: it says the opposite when they do."""

from __future__ import annotations

from portllm.reporting.arms import LEAST_GAIN, WITHIN, mean
from portllm.reporting.findings import Average, Findings, total_seconds
from portllm.reporting.formats import listing, percent, percent_sign, points, seconds, times
from portllm.reporting.knowledge import share_kept

# what share of re-tuning's gain a port must keep to be called a success, and to be called a partial one
CARRIED, PARTLY = 0.9, 0.5


def paragraph(findings: Findings) -> str:
    """Verdict, scores per release, failures, knowledge, control and cost, in plain sentences."""
    return " ".join(parts(findings))


def parts(findings: Findings) -> list[str]:
    """The paragraph in parts that can stand alone: the verdict, one per later release, then what limits it."""
    said = [verdict(findings), _made(findings)]
    said += [_release(findings, findings.average(release)) for release in findings.releases[1:]]
    said += [_spaced(_unknown(findings), _control(findings), _cost(findings))]
    return [part for part in said if part]


def _made(findings: Findings) -> str:
    """What the patches were worth where they were made."""
    cells = [c for c in findings.on(findings.first) if "tuned" in c.scores]
    tuned, base = mean(c.value("tuned") for c in cells), mean(c.value("base") for c in cells)
    if tuned is None or base is None:
        return ""
    said = f"On {findings.first}, where they were made, the patches score {percent_sign(tuned)} on average"
    said += f" against {percent_sign(base)} for the bare base."
    weak = [c.task for c in cells if c.scores["tuned"].value - c.scores["base"].value < LEAST_GAIN]
    return _spaced(said, f"On {listing(weak)} the patch itself learnt nothing." if weak else "")


def _spaced(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def verdict(findings: Findings) -> str:
    """Did the patches carry, judged by the mean recovery of each later release; what cannot be judged is said."""
    later = [findings.average(release) for release in findings.releases[1:]]
    if not later:
        return "There is only one release, so nothing could be ported yet."
    known = [average.recovery for average in later if average.recovery is not None]
    flat = [a.release for a in later if a.recovery is None and a.retuned is not None]
    where = f"On {listing(flat)} re-tuning itself gains less than {percent(LEAST_GAIN, 0)} points on average"
    if not known:
        return f"{where}: there was nothing to carry over." if flat else _without_reference(later)
    return _spaced(_judged(min(known), max(known)), f"{where}, so nothing can be said there." if flat else "")


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
        close, near = sum(c.within is True for c in average.cells), percent(WITHIN, 0)
        scores += f"; {close} of {len(average.cells)} tasks are within {near} points of re-tuning"
    else:
        scores += f" against {percent_sign(average.base)} for the bare release"
    if average.negative_flips is not None:
        scores += f"; {percent_sign(average.negative_flips)} of the examples flipped from right to wrong"
    return _spaced(scores + ".", _failures(average), _knowledge(findings, average.release))


def _failures(average: Average) -> str:
    """The tasks that fell short, and those below the bare release; empty when none did."""
    short = [
        f"{c.task} ({points(c.scores['ported'].value - c.scores['retuned'].value)} points)"
        for c in average.cells
        if c.within is False
    ]
    below = [c.task for c in average.cells if c.scores["ported"].value < c.scores["base"].value]
    said = [f"It fell short of re-tuning on {listing(short)}."] if short else []
    if below:
        said.append(f"On {listing(below)} the ported patch is below the bare release: do not use it there.")
    return _spaced(*said)


def _knowledge(findings: Findings, release: str) -> str:
    kept = share_kept(findings.knowledge, release, "ported")
    old = share_kept(findings.knowledge, release, "old")
    if kept is None:
        return ""
    said = f"The ported models keep {percent_sign(kept)} of what {release} newly knows"
    return said + (f", the old tuned models know {percent_sign(old)} of it." if old is not None else ".")


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


def _cost(findings: Findings) -> str:
    totals = total_seconds(findings.costs)
    if totals is None:
        return ""
    port, retune = totals
    if min(totals) <= 0:
        return f"Porting took {seconds(port)} in all, re-tuning {seconds(retune)}."
    pace = f"{times(retune / port)} faster" if retune >= port else f"{times(port / retune)} slower"
    return f"Porting took {seconds(port)} in all where re-tuning took {seconds(retune)}: {pace}, with no training data."
