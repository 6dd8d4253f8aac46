"""Compare the arms per task and release: scores, recovery, paired differences, flips, the control, recall of news.

Recovery is (ported − base)/(retuned − base), the share of re-tuning's gain that the port keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from portllm.algebra.statistics import bootstrap_difference, mcnemar_p, wilson
from portllm.errors import DataError
from portllm.params import ReportParams
from portllm.reporting.results import ReleaseScores, Results, RowKey

ARMS = ("base", "tuned", "ported", "retuned")
# `old` is the first release's tuned model, which was never trained on the news
RECALL_ARMS = ("base", "old", "ported", "retuned", "tuned")
MAIN_METRICS = ("exact_match,strict-match", "acc,none", "exact_match,none", "acc_norm,none")
# a task may have several scores, or one by several filters; those that lie between 0 and 1
SHARES = ("acc", "acc_norm", "exact_match", "f1", "mcc")
FORMAT_METRIC = "format"
LEAST_GAIN = 0.02  # re-tuning must gain this much for a recovery to mean anything
WITHIN = 0.05  # "close to re-tuning" everywhere in the report
RECALL, PERPLEXITY = "_recall", "_perplexity"
KINDS = ("changed", "new", "kept")
PERPLEXITY_METRICS = ("word_perplexity,none", "perplexity,none", "byte_perplexity,none")


@dataclass(frozen=True, kw_only=True)
class ArmScore:
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
class Comparison:
    """The arms of one task on one release; `other_metrics` maps metric → arm → value."""

    release: str
    task: str
    metric: str
    scores: Mapping[str, ArmScore]
    recovery: float | None
    against_retuned: Pairing | None
    flips: Flips | None
    other_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def value(self, arm: str) -> float | None:
        """Return the arm's score, None where it was not measured."""
        return self.scores[arm].value if arm in self.scores else None

    @property
    def within(self) -> bool | None:
        """Return whether `ported` is at most WITHIN below `retuned`; None where either is missing."""
        ported, retuned = self.value("ported"), self.value("retuned")
        return None if ported is None or retuned is None else ported - retuned >= -WITHIN - 1e-12


@dataclass(frozen=True, kw_only=True)
class Control:
    """How many answers of a patch ported onto its own release differ from the patch's own: 0 when the port is right."""

    task: str
    pairs: int
    differing: int


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What one arm recalls of one corpus: shares of facts by kind, and the perplexity of its unseen text.

    `patch_task` is the task of the patch, None for the bare release.
    """

    release: str
    corpus: str
    arm: str
    patch_task: str | None
    facts: Mapping[str, float]
    perplexity: float | None

    @property
    def news(self) -> float | None:
        """Return the mean recall of changed and new facts, which only this release can have."""
        return mean([self.facts.get("changed"), self.facts.get("new")])


def compare(results: Results, params: ReportParams) -> tuple[Comparison, ...]:
    """Return one comparison per release and task, in the order of params. Raises DataError."""
    return tuple(_compared(results, release, task, params) for release in results.releases for task in results.tasks)


def controls(results: Results) -> tuple[Control, ...]:
    """Return `ported` against `tuned` on the first release, for every task that has both."""
    answers = results.scores[results.first].correct
    controls = []
    for task in results.tasks:
        tuned, ported = answers.get((task, "tuned", task)), answers.get((task, "ported", task))
        if tuned and ported:
            docs = tuned.keys() & ported.keys()
            differing = sum(tuned[d] != ported[d] for d in docs) + len(tuned.keys() ^ ported.keys())
            controls.append(Control(task=task, pairs=len(docs), differing=differing))
    return tuple(controls)


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None when all are."""
    numbers = [v for v in values if v is not None]
    return fmean(numbers) if numbers else None


def main_metric(task: str, metrics: Mapping[str, float]) -> str:
    """Return the metric the report calls the task's score. Raises DataError when none is a share of right answers."""
    for name in MAIN_METRICS:
        if name in metrics:
            return name
    raise DataError(
        f"{task}: no score to report; expected one of {', '.join(MAIN_METRICS)}, found {', '.join(metrics) or 'none'}"
    )


def recovery(base: float | None, ported: float | None, retuned: float | None) -> float | None:
    """Return (ported − base)/(retuned − base); None unless re-tuning gained at least LEAST_GAIN."""
    if base is None or ported is None or retuned is None or retuned - base < LEAST_GAIN:
        return None
    return (ported - base) / (retuned - base)


def _compared(results: Results, release: str, task: str, params: ReportParams) -> Comparison:
    here = results.scores[release]
    scores = {}
    metric = ""
    for arm in ARMS:
        key = (task, arm, None if arm == "base" else task)
        if key in here.metrics:
            metric = main_metric(task, here.metrics[key])
            scores[arm] = _score(here, key, metric)
    if "base" not in scores:
        raise DataError(f"evaluation of {release}: has no base arm on {task}; run `dvc repro evaluate`")
    values = {arm: score.value for arm, score in scores.items()}
    ported = here.correct.get((task, "ported", task))
    retuned = here.correct.get((task, "retuned", task))
    tuned = results.scores[results.first].correct.get((task, "tuned", task))
    return Comparison(
        release=release,
        task=task,
        metric=metric,
        scores=scores,
        recovery=recovery(values["base"], values.get("ported"), values.get("retuned")),
        against_retuned=pair(ported, retuned, params) if ported and retuned else None,
        flips=flips(tuned, ported) if tuned and ported else None,
        other_metrics=_other_metrics(here, task, metric),
    )


def _other_metrics(scores: ReleaseScores, task: str, main: str) -> dict[str, dict[str, float]]:
    """Return lm-eval's other shares of a task, by metric and arm: gsm8k's second filter, mrpc's F1."""
    shares: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        for metric, value in scores.metrics.get((task, arm, None if arm == "base" else task), {}).items():
            if metric != main and metric.partition(",")[0] in SHARES:
                shares.setdefault(metric, {})[arm] = value
    return shares


def _score(scores: ReleaseScores, key: RowKey, metric: str) -> ArmScore:
    value = scores.metrics[key][metric]
    samples = scores.counts[key]
    right = scores.correct.get(key)
    if right and abs(sum(right.values()) / len(right) - value) > 0.5 / len(right) + 1e-9:
        raise DataError(
            f"evaluation of {scores.release}: {metric} of {key[0]}, arm {key[1]}, is {value:.4f} but its samples "
            f"average {sum(right.values()) / len(right):.4f}; run `dvc repro evaluate` again"
        )
    low, high = wilson(value * samples, samples)
    return ArmScore(value=value, low=low, high=high, samples=samples, format=valid_format(scores.metrics[key]))


def valid_format(metrics: Mapping[str, float]) -> float | None:
    """Return the metric `format,FILTER`: the filter is none for multiple choice, strict-match for generated numbers."""
    return next((value for key, value in sorted(metrics.items()) if key.split(",")[0] == FORMAT_METRIC), None)


def pair(left: Mapping[int, bool], right: Mapping[int, bool], params: ReportParams) -> Pairing | None:
    """Return left − right over the examples both answered, paired by document; None when they share none."""
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
    """Return the shares of the examples both answered that flipped; None when they share none."""
    docs = before.keys() & after.keys()
    if not docs:
        return None
    return Flips(
        pairs=len(docs),
        negative=sum(before[d] and not after[d] for d in docs) / len(docs),
        positive=sum(after[d] and not before[d] for d in docs) / len(docs),
    )


def recalls(results: Results) -> tuple[Recall, ...]:
    """Return what every arm recalls of every corpus it was asked about, by release, corpus, arm and patch."""
    places = {task: place for place, task in enumerate(results.tasks)}
    rows = []
    for release in results.releases:
        here = results.scores[release]
        keys = {
            (corpus, arm, patch)
            for task, arm, patch in here.metrics
            if arm in RECALL_ARMS and (corpus := _corpus(task))
        }
        order = sorted(keys, key=lambda key: (key[0], RECALL_ARMS.index(key[1]), places.get(key[2] or "", -1)))
        rows += [_recall(here, corpus, arm, patch) for corpus, arm, patch in order]
    return tuple(rows)


def share_kept(rows: tuple[Recall, ...], release: str, arm: str) -> float | None:
    """Return the mean over patches of an arm's recall of the news, as a share of what the bare release recalls."""
    here = [row for row in rows if row.release == release and row.news is not None]
    bare = mean(row.news for row in here if row.arm == "base")
    share = mean(row.news for row in here if row.arm == arm)
    return None if not bare or share is None else share / bare


def _recall(scores: ReleaseScores, corpus: str, arm: str, patch: str | None) -> Recall:
    facts = scores.metrics.get((corpus + RECALL, arm, patch), {})
    text = scores.metrics.get((corpus + PERPLEXITY, arm, patch), {})
    kinds = {kind: facts[f"acc_{kind},none"] for kind in KINDS if f"acc_{kind},none" in facts}
    if "acc,none" in facts:
        kinds["all"] = facts["acc,none"]
    return Recall(
        release=scores.release,
        corpus=corpus,
        arm=arm,
        patch_task=patch,
        facts=kinds,
        perplexity=next((text[name] for name in PERPLEXITY_METRICS if name in text), None),
    )


def _corpus(task: str) -> str:
    """Return the corpus a task asks about, empty for any other task."""
    for suffix in (RECALL, PERPLEXITY):
        if task.endswith(suffix):
            return task.removesuffix(suffix)
    return ""
