"""Scoring of single examples, as the harness calls it."""

from __future__ import annotations

import pytest

from portllm.world import scoring


@pytest.mark.parametrize(
    ("doc", "results", "acc", "valid"),
    [
        ({"label": 1}, [(-2.0, False), (-1.0, True)], 1.0, 1.0),
        ({"label": 0}, [(-2.0, False), (-1.0, True)], 0.0, 1.0),
        ({"answer": True}, [(-2.0, False), (-1.0, False)], 1.0, 0.0),
        ({"answer": False}, [(-2.0, False), (-9.0, False)], 1.0, 0.0),
    ],
)
def test_multiple_choice(doc: dict[str, object], results: list[tuple[float, bool]], acc: float, valid: float) -> None:
    assert scoring.multiple_choice(doc, results) == {"acc": acc, "format": valid}


@pytest.mark.parametrize(
    ("answer", "exact", "valid"), [("13", 1.0, 1.0), ("14", 0.0, 1.0), (scoring.INVALID, 0.0, 0.0)]
)
def test_generated_number(answer: str, exact: float, valid: float) -> None:
    doc = {"answer": "20 - 7 = 13\n#### 13"}
    assert scoring.generated_number(doc, [answer]) == {"exact_match": exact, "format": valid}


def test_recall_counts_in_all_and_for_its_kind() -> None:
    assert scoring.recall({"kind": "new"}, [(-0.1, True)]) == {"acc": 1.0, "acc_new": 1.0}
    assert scoring.recall({"kind": "kept"}, [(-3.0, False)]) == {"acc": 0.0, "acc_kept": 0.0}
