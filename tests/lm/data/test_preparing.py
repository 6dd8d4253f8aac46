"""Rows kept apart: what is asked is not trained on, also where a definition makes rows of its own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.lm.data import preparing, sources, tables
from portllm.params import PrepareParams

DEFINITION = {
    "task": "made_up",
    "output_type": "multiple_choice",
    "training_split": "train",
    "validation_split": "validation",
    "doc_to_text": "{{text}}",
    "doc_to_target": "label",
    "doc_to_choice": ["no", "yes"],
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
ROWS = [{"text": text, "label": 0} for text in ("a", "b", "c", "d")]
ASKED = [{"text": " B", "label": 1}]


def prepared(**more: Any) -> preparing.Prepared:
    splits = {"train": tables.of_rows(ROWS, where=""), "validation": tables.of_rows(ASKED, where="")}
    loaded = sources.Loaded(splits=splits, source="local")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        return preparing._harness("made_up", {**DEFINITION, **more}, loaded, list(splits), PrepareParams())


@pytest.mark.slow
def test_a_row_that_is_asked_is_taken_out() -> None:
    made = prepared(process_docs=lambda rows: rows.map(lambda row: {"text": row["text"].upper()}))
    assert made.decisions == {"overlap": 1}
    assert [row["text"] for row in made.splits["train"].to_pylist()] == ["a", "c", "d"]


@pytest.mark.slow
def test_where_rows_are_not_the_files_the_overlap_is_counted_and_kept() -> None:
    made = prepared(process_docs=lambda rows: rows.filter(lambda row: row["text"] != "a"))
    assert made.decisions == {"overlap_kept": 1}
    assert made.splits["train"].to_pylist() == ROWS


@given(st.lists(st.sampled_from("aAbBcdefgh"), min_size=1), st.integers(0, 5), st.integers(0, 5), st.integers())
@settings(max_examples=60, deadline=None)
def test_rows_that_ask_the_same_stay_together(letters: list[str], test: int, validation: int, seed: int) -> None:
    keys = [preparing.key(letter) for letter in letters]
    split = preparing.hold_out(keys, {"test": test, "validation": validation}, str(seed), rest="train")
    assert sorted(number for rows in split.values() for number in rows) == list(range(len(letters)))
    asked = [{keys[number] for number in rows} for rows in split.values()]
    assert sum(map(len, asked)) == len(set(keys)), "no question stands in two splits"
    assert split == preparing.hold_out(keys, {"test": test, "validation": validation}, str(seed), rest="train")
    assert len(split["test"]) >= min(test, len(letters))


@given(st.integers(0, 50), st.integers(0, 60), st.text(max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_sample_is_some_of_the_rows_in_order(count: int, wanted: int, seed: str) -> None:
    chosen = preparing.sample(count, wanted, seed)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(count))
    assert len(chosen) == (min(count, wanted) if wanted else count)


@pytest.mark.slow
def test_where_rows_come_in_another_order_the_overlap_is_counted_and_kept() -> None:
    made = prepared(process_docs=lambda rows: rows.select(list(reversed(range(len(rows))))))
    assert made.decisions == {"overlap_kept": 1}
    assert made.splits["train"].to_pylist() == ROWS
