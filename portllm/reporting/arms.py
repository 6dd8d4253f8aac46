"""The arms of the comparison, per task and release: scores, recovery, paired differences, flips, the control."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from portllm.algebra.statistics import bootstrap_difference, mcnemar_p, wilson
from portllm.errors import DataError
from portllm.params import ReportParams
from portllm.reporting.evidence import Evaluation, Evidence

ARMS = ("base", "tuned", "ported", "retuned")
MAIN_METRICS = ("exact_match,strict-match", "acc,none", "exact_match,none", "acc_norm,none")
# a task may have several scores, or one by several filters; those that lie between 0 and 1
SHARES = ("acc", "acc_norm", "exact_match", "f1", "mcc")
FORMAT_METRIC = "format"
LEAST_GAIN = 0.02  # re-tuning must gain this much for a recovery to mean anything
WITHIN = 0.05  # "close to re-tuning" everywhere in the report


@dataclass(frozen=True, kw_only=True)
class Score:
    """An arm's share of right answers, its 95% interval, and the share of answers in a valid format."""

    value: float
    low: float
    high: float
    samples: int
    format: float | None


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Two arms on the same examples: difference = (wins − losses)/pairs with a 95% bootstrap interval."""

    pairs: int
    wins: int
    losses: int
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Against `tuned` on the first release: shares of examples that went from right to wrong, and back."""

    pairs: int
    negative: float
    positive: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One task on one release."""

    release: str
    task: str
    metric: str
    scores: Mapping[str, Score]
    recovery: float | None
    against_retuned: Pairing | None
    flips: Flips | None
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # metric → arm → value

    def value(self, arm: str) -> float | None:
        """The arm's score, or None where it was not measured."""
        return self.scores[arm].value if arm in self.scores else None

    @property
    def within(self) -> bool | None:
        """Whether `ported` is at most WITHIN below `retuned`; None where either is missing."""
        ported, retuned = self.value("ported"), self.value("retuned")
        return None if ported is None or retuned is None else ported - retuned >= -WITHIN - 1e-12


@dataclass(frozen=True, kw_only=True)
class Control:
    """On its own release a ported patch must answer as the patch itself: how many examples differ."""

    task: str
    pairs: int
    differing: int


def compare(evidence: Evidence, params: ReportParams) -> tuple[Cell, ...]:
    """One cell per release and task, in the order of params. Raises DataError."""
    return tuple(_cell(evidence, release, task, params) for release in evidence.releases for task in evidence.tasks)


def controls(evidence: Evidence) -> tuple[Control, ...]:
    """`ported` against `tuned` on the first release, for every task that has both."""
    answers = evidence.evaluations[evidence.first].correct
    found = []
    for task in evidence.tasks:
        tuned, ported = answers.get((task, "tuned", task)), answers.get((task, "ported", task))
        if tuned and ported:
            docs = tuned.keys() & ported.keys()
            differing = sum(tuned[d] != ported[d] for d in docs) + len(tuned.keys() ^ ported.keys())
            found.append(Control(task=task, pairs=len(docs), differing=differing))
    return tuple(found)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is known, None when nothing is."""
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def main_metric(task: str, metrics: Mapping[str, float]) -> str:
    """The metric the report calls the task's score. Raises DataError when none is a share of right answers."""
    for name in MAIN_METRICS:
        if name in metrics:
            return name
    raise DataError(
        f"{task}: no score to report; expected one of {', '.join(MAIN_METRICS)}, found {', '.join(metrics) or 'none'}"
    )


def recovery(base: float | None, ported: float | None, retuned: float | None) -> float | None:
    """(ported − base)/(retuned − base), None unless re-tuning gained at least LEAST_GAIN."""
    if base is None or ported is None or retuned is None or retuned - base < LEAST_GAIN:
        return None
    return (ported - base) / (retuned - base)


def _cell(evidence: Evidence, release: str, task: str, params: ReportParams) -> Cell:
    evaluation = evidence.evaluations[release]
    scores = {}
    metric = ""
    for arm in ARMS:
        key = (task, arm, None if arm == "base" else task)
        if key in evaluation.metrics:
            metric = main_metric(task, evaluation.metrics[key])
            scores[arm] = _score(evaluation, key, metric)
    if "base" not in scores:
        raise DataError(f"evaluation of {release}: has no base arm on {task}; run `dvc repro evaluate`")
    values = {arm: score.value for arm, score in scores.items()}
    ported = evaluation.correct.get((task, "ported", task))
    retuned = evaluation.correct.get((task, "retuned", task))
    tuned = evidence.evaluations[evidence.first].correct.get((task, "tuned", task))
    return Cell(
        release=release,
        task=task,
        metric=metric,
        scores=scores,
        recovery=recovery(values["base"], values.get("ported"), values.get("retuned")),
        against_retuned=pair(ported, retuned, params) if ported and retuned else None,
        flips=flips(tuned, ported) if tuned and ported else None,
        others=_others(evaluation, task, metric),
    )


def _others(evaluation: Evaluation, task: str, main: str) -> dict[str, dict[str, float]]:
    """The harness's other shares of a task, by metric and arm: gsm8k's second filter, mrpc's F1."""
    found: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        for metric, value in evaluation.metrics.get((task, arm, None if arm == "base" else task), {}).items():
            if metric != main and metric.partition(",")[0] in SHARES:
                found.setdefault(metric, {})[arm] = value
    return found


def _score(evaluation: Evaluation, key: tuple[str, str, str | None], metric: str) -> Score:
    value = evaluation.metrics[key][metric]
    samples = evaluation.counts[key]
    right = evaluation.correct.get(key)
    if right and abs(sum(right.values()) / len(right) - value) > 0.5 / len(right) + 1e-9:
        raise DataError(
            f"evaluation of {evaluation.release}: {metric} of {key[0]}, arm {key[1]}, is {value:.4f} but its samples "
            f"average {sum(right.values()) / len(right):.4f}; run `dvc repro evaluate` again"
        )
    low, high = wilson(value * samples, samples)
    return Score(value=value, low=low, high=high, samples=samples, format=valid_format(evaluation.metrics[key]))


def valid_format(metrics: Mapping[str, float]) -> float | None:
    """`format,FILTER`: the filter is none for multiple choice, strict-match for generated numbers."""
    return next((value for key, value in sorted(metrics.items()) if key.split(",")[0] == FORMAT_METRIC), None)


def pair(left: Mapping[int, bool], right: Mapping[int, bool], params: ReportParams) -> Pairing | None:
    """left − right over the examples both answered, paired by document; None when they share none."""
    docs = left.keys() & right.keys()
    if not docs:
        return None
    wins = sum(left[d] and not right[d] for d in docs)
    losses = sum(right[d] and not left[d] for d in docs)
    low, high = bootstrap_difference(
        wins, len(docs) - wins - losses, losses, samples=params.bootstrap_samples, seed=params.seed
    )
    return Pairing(
        pairs=len(docs),
        wins=wins,
        losses=losses,
        difference=(wins - losses) / len(docs),
        low=low,
        high=high,
        p_value=mcnemar_p(wins, losses),
    )


def flips(before: Mapping[int, bool], after: Mapping[int, bool]) -> Flips | None:
    """Shares of the examples both answered that flipped; None when they share none."""
    docs = before.keys() & after.keys()
    if not docs:
        return None
    return Flips(
        pairs=len(docs),
        negative=sum(before[d] and not after[d] for d in docs) / len(docs),
        positive=sum(after[d] and not before[d] for d in docs) / len(docs),
    )
