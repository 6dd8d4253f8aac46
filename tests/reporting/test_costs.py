"""The findings and the headline of the page of costs."""

from __future__ import annotations

import pytest

from portllm.params import EvolveParams, Params, ReleaseParams
from portllm.reporting.findings.costs import Execution, executions, find_costs
from portllm.reporting.results import Cost
from portllm.reporting.sections.cost_tables import cost_headline

PARAMS = Params(tasks=("t1",), releases=("v0", "v1"), evolve=EvolveParams(releases={"v1": ReleaseParams(base="v0")}))


def cost(stage: str, release: str, seconds: float, task: str | None = "t1") -> Cost:
    return Cost(
        stage=stage, release=release, task=task, wall_seconds=seconds, peak_rss_bytes=2**28, trainable_parameters=None
    )


def test_every_execution_of_the_pipeline_is_expected_once() -> None:
    expected = [str(one) for one in executions(PARAMS)]
    assert expected == [
        "fetch/v0", "evolve/v1", "train/v0/t1", "train/v1/t1", "port/v0/t1", "port/v1/t1", "evaluate/v0", "evaluate/v1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("port", "retune", "text"),
    [(4.0, 16.0, "4.0× faster"), (9.0, 3.0, "3.0× slower"), (0.0, 3.0, "re-tuning 3.0 s.")],
)
def test_the_headline_follows_the_seconds(port: float, retune: float, text: str) -> None:
    findings = find_costs((cost("port", "v1", port), cost("train", "v1", retune)), PARAMS)
    assert text in cost_headline(findings)[0]
    assert cost_headline(findings)[-1].startswith("2 of 8 executions")


def test_a_pair_with_one_side_is_shown_and_not_added_up() -> None:
    findings = find_costs((cost("port", "v1", 4.0), cost("port", "v0", 4.0)), PARAMS)
    assert [(pair.release, pair.retune, pair.speedup) for pair in findings.pairs] == [("v1", None, None)]
    assert findings.total_seconds is None
    assert Execution("train", "v1", "t1") in findings.absent


def test_a_stage_adds_up_its_executions() -> None:
    (stage,) = find_costs((cost("evaluate", "v0", 1.5, None), cost("evaluate", "v1", 2.0, None)), PARAMS).stages
    assert (stage.executions, stage.wall_seconds, stage.peak_rss_bytes) == (2, 3.5, 2**28)
