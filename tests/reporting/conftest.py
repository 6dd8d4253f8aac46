"""Findings made by hand, without files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from portllm.reporting.findings.arms import Comparison, Control, Flips, Recall, ScoreEstimate, recovery
from portllm.reporting.findings.summary import Findings

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]


def comparison(release: str, task: str, values: Mapping[str, float], flips: float | None = 0.02) -> Comparison:
    scores = {
        arm: ScoreEstimate(value=v, low=max(0.0, v - 0.03), high=min(1.0, v + 0.03), samples=100, format=1.0)
        for arm, v in values.items()
    }
    return Comparison(
        release=release,
        task=task,
        metric="acc,none",
        scores=scores,
        recovery=recovery(values.get("base"), values.get("ported"), values.get("retuned")),
        against_retuned=None,
        flips=None if flips is None else Flips(pairs=100, negative=flips, positive=0.0),
    )


def recall(release: str, arm: str, share: float, patch_task: str | None = "t1") -> Recall:
    facts = {"changed": share, "new": share, "kept": 0.9}
    return Recall(
        release=release, corpus=f"corpus_{release}", arm=arm, patch_task=patch_task, facts=facts, perplexity=2.0
    )


@pytest.fixture
def make() -> Callable[..., Findings]:
    """`make({release: {task: {arm: score}}}, **changes)` as findings."""

    def build(scores: Scores, **changes: Any) -> Findings:
        releases = tuple(scores)
        tasks = tuple(scores[releases[0]])
        fields: dict[str, Any] = {
            "releases": releases,
            "tasks": tasks,
            "probe_threshold": 0.9,
            "probes": {releases[0]: dict.fromkeys(tasks, 1.0)},
            "fingerprints": dict.fromkeys(releases, "ab" * 32),
            "comparisons": tuple(
                comparison(r, t, arms) for r, by_task in scores.items() for t, arms in by_task.items()
            ),
            "controls": tuple(Control(task=t, pairs=100, differing=0) for t in tasks),
            "recalls": (),
            "drifts": (),
            "residuals": (),
            "unmeasured": (),
            "curves": (),
        }
        return Findings(**{**fields, **changes})

    return build


@pytest.fixture
def good(make: Callable[..., Findings]) -> Findings:
    """Two tasks that carry over."""
    later = {"base": 0.5, "ported": 0.93, "retuned": 0.95}
    first = {"base": 0.5, "tuned": 0.96, "ported": 0.96}
    return make(
        {"v0": {"t1": first, "t2": first}, "v1": {"t1": later, "t2": later}},
        recalls=(recall("v1", "base", 1.0, None), recall("v1", "ported", 0.95), recall("v1", "old", 0.04)),
    )
