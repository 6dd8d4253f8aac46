"""The harness's results of a task as ours: every filter's metrics, one row a document; and the file of results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from portllm.errors import EvaluationError
from portllm.lm.scoring.scored import ROW, expect_rows, main_metric, of_results


def sample(doc: int, name: str, *, answers: list[Any], resps: list[Any], **metrics: Any) -> dict[str, Any]:
    row = {"doc_id": doc, "filter": name, "target": "t", "filtered_resps": answers, "resps": resps}
    return {**row, "metrics": list(metrics), **metrics}


def test_two_filters_make_one_row_a_document() -> None:
    rows = [
        sample(doc, name, answers=[f"{name} {doc}"], resps=[["72 eggs"]], exact_match=value)
        for doc, name, value in [(1, "strict-match", 0.0), (0, "flexible-extract", 1.0), (0, "strict-match", 1.0),
                                 (1, "flexible-extract", 1.0)]
    ]  # fmt: skip
    metrics = {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match,flexible-extract": 1.0}
    metrics |= {"exact_match_stderr,strict-match": "N/A", "sample_len": 2}
    scored = of_results("gsm8k", {"results": {"gsm8k": metrics}, "samples": {"gsm8k": rows}}, split="test")
    assert scored.metrics == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 1.0}
    assert [s.doc_id for s in scored.documents] == [0, 1]
    last = scored.documents[1]
    assert (last.score, last.answer) == (0.0, "strict-match 1"), "the strict filter is the task's main one"
    assert last.metrics == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    assert last.answers == {"strict-match": "strict-match 1", "flexible-extract": "flexible-extract 1"}
    assert (last.loglikelihoods, last.written) == ((), "72 eggs")


def test_choices_keep_their_log_likelihoods_and_pairs_of_labels_count_as_right_or_wrong() -> None:
    said = [(-2.5, False), (-1.5, True)]
    row = sample(4, "none", answers=said, resps=[[one] for one in said], acc=1.0, f1=(0, 1))
    results = {"results": {"mrpc": {"acc,none": 1.0, "f1,none": 0.0}}, "samples": {"mrpc": [row]}}
    (one,) = of_results("mrpc", results, split="validation").documents
    assert (one.answer, one.loglikelihoods, one.written) == ("1", (-2.5, -1.5), "")
    assert one.metrics == {"acc,none": 1.0, "f1,none": 0.0}


def test_a_rolling_log_likelihood_is_the_document_s_score() -> None:
    row = sample(0, "none", answers=[-12.5], resps=[[-12.5]], word_perplexity=(-12.5, 4))
    results = {"results": {"p": {"word_perplexity,none": 3.0}}, "samples": {"p": [row]}}
    (one,) = of_results("p", results, split="test").documents
    assert (one.score, one.loglikelihoods) == (-12.5, (-12.5,))


@pytest.mark.parametrize(
    ("metrics", "judge"),
    [
        ({"f1,none": 0.1, "acc,none": 0.2, "acc_norm,none": 0.3}, "acc,none"),
        ({"exact_match,flexible-extract": 1.0, "exact_match,strict-match": 0.0}, "exact_match,strict-match"),
        ({"byte_perplexity,none": 1.0, "word_perplexity,none": 2.0}, "word_perplexity,none"),
        ({"rouge2_max,none": 1.0, "bleu_max,none": 2.0}, "rouge2_max,none"),
        ({"mcc,none": 0.0}, "mcc,none"),
    ],
)
def test_what_a_task_is_judged_by(metrics: dict[str, float], judge: str) -> None:
    assert main_metric(metrics) == judge


def test_a_task_without_a_number_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="no metric that is a number"):
        main_metric({})


def test_a_metric_that_is_no_number_on_a_document_is_not_made_one() -> None:
    row = sample(0, "none", answers=["x"], resps=[["x"]], bleu={"a": 1}, exact_match=1.0)
    results = {"results": {"t": {"exact_match,none": 1.0, "bleu,none": 2.0}}, "samples": {"t": [row]}}
    (one,) = of_results("t", results, split="test").documents
    assert one.score == 1.0
    assert math.isnan(one.metrics["bleu,none"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"metrics": None}, "has no metrics, but None"),
        ({"metrics": {}}, "has no metrics, but {}"),
        ({"metrics": {"acc,none": "0.5"}}, "has '0.5' as acc,none, expected a finite number"),
        ({"metrics": {"acc,none": math.nan}}, "has nan as acc,none, expected a finite number"),
    ],
)
def test_a_row_of_the_results_file_without_metrics_is_an_error(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    """issue 8, item 16: it was a KeyError."""
    row: dict[str, Any] = {**dict.fromkeys(ROW), "task": "sst2", "metrics": {"acc,none": 1.0}, "samples": 1}
    expect_rows([row, {**row, "truncated": 3}], tmp_path / "v1.json")
    with pytest.raises(EvaluationError) as refusal:
        expect_rows([row, {**row, **change}], tmp_path / "v1.json")
    assert str(refusal.value).endswith(f"v1.json: result 1 (sst2) {problem}; run portllm evaluate again")


@pytest.mark.parametrize("rows", [None, [None], [{}], [{"task": "sst2"}]])
def test_rows_that_are_none_of_ours_are_an_error(rows: Any) -> None:
    with pytest.raises(EvaluationError, match="run portllm evaluate again"):
        expect_rows(rows, Path("v1.json"))
