"""What each arm knows of a release's news: recall of facts by kind, and perplexity of unseen news."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from portllm.reporting.arms import mean
from portllm.reporting.evidence import Evaluation, Evidence

RECALL, PERPLEXITY = "_recall", "_perplexity"
KINDS = ("changed", "new", "kept")
PERPLEXITY_METRICS = ("word_perplexity,none", "perplexity,none", "byte_perplexity,none")
# `old` is the first release's tuned model, which never saw the news
KNOWERS = ("base", "old", "ported", "retuned", "tuned")


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """One arm (with the patch for `patch_task`, None for the bare release) asked about one corpus."""

    release: str
    corpus: str
    arm: str
    patch_task: str | None
    recall: Mapping[str, float]
    perplexity: float | None

    @property
    def news(self) -> float | None:
        """Mean recall of changed and new facts: what only this release can know."""
        return mean([self.recall.get("changed"), self.recall.get("new")])


def gather(evidence: Evidence) -> tuple[Knowledge, ...]:
    """Every arm's knowledge of every corpus it was asked about, by release, corpus, arm and patch."""
    found = []
    for release in evidence.releases:
        evaluation = evidence.evaluations[release]
        known = (key for key in evaluation.metrics if key[1] in KNOWERS and _corpus(key[0]))
        rows = {(_corpus(task), arm, patch) for task, arm, patch in known}
        order = {name: i for i, name in enumerate(evidence.tasks)}
        for corpus, arm, patch in sorted(
            rows, key=lambda row: (row[0], KNOWERS.index(row[1]), order.get(row[2] or "", -1))
        ):
            found.append(_knowledge(evaluation, corpus, arm, patch))
    return tuple(found)


def share_kept(rows: tuple[Knowledge, ...], release: str, arm: str) -> float | None:
    """Mean over patches of an arm's recall of the news, as a share of what the bare release recalls."""
    here = [row for row in rows if row.release == release and row.news is not None]
    known = mean(row.news for row in here if row.arm == "base")
    has = mean(row.news for row in here if row.arm == arm)
    return None if not known or has is None else has / known


def _knowledge(evaluation: Evaluation, corpus: str, arm: str, patch: str | None) -> Knowledge:
    recalled = evaluation.metrics.get((corpus + RECALL, arm, patch), {})
    perplexed = evaluation.metrics.get((corpus + PERPLEXITY, arm, patch), {})
    kinds = {kind: recalled[f"acc_{kind},none"] for kind in KINDS if f"acc_{kind},none" in recalled}
    if "acc,none" in recalled:
        kinds["all"] = recalled["acc,none"]
    return Knowledge(
        release=evaluation.release,
        corpus=corpus,
        arm=arm,
        patch_task=patch,
        recall=kinds,
        perplexity=next((perplexed[name] for name in PERPLEXITY_METRICS if name in perplexed), None),
    )


def _corpus(task: str) -> str:
    """The corpus a task asks about, empty for any other task."""
    for suffix in (RECALL, PERPLEXITY):
        if task.endswith(suffix):
            return task.removesuffix(suffix)
    return ""
