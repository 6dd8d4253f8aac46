"""The world's tasks: columns, balance, and splits that share nothing they are about."""

from __future__ import annotations

import pytest

from portllm.errors import DataError
from portllm.world import datasets, people, words

SIZES = {"train_rows": 600, "test_rows": 480}
COLUMNS = {
    "world_boolq": ["answer", "passage", "question"],
    "world_sst2": ["idx", "label", "sentence"],
    "world_mrpc": ["idx", "label", "sentence1", "sentence2"],
    "world_gsm8k": ["answer", "question"],
}
MULTIPLE_CHOICE = ("world_boolq", "world_sst2", "world_mrpc")


def texts(row: dict[str, object]) -> tuple[str, ...]:
    return tuple(str(v) for k, v in row.items() if k not in ("idx", "label", "answer"))


@pytest.fixture(scope="module", params=[0, 7], ids=lambda seed: f"seed{seed}")
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("task", datasets.TASKS)
def test_splits_have_the_hubs_columns_and_the_sizes_asked_for(task: str, seed: int) -> None:
    splits = datasets.rows(task, seed=seed, **SIZES)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 600, "validation": 240, "test": 480}
    assert all(sorted(row) == COLUMNS[task] for rows in splits.values() for row in rows)


@pytest.mark.parametrize("task", datasets.TASKS)
def test_no_question_is_asked_twice_in_or_across_splits(task: str, seed: int) -> None:
    asked = [texts(row) for rows in datasets.rows(task, seed=seed, **SIZES).values() for row in rows]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("task", MULTIPLE_CHOICE)
def test_labels_are_balanced_in_every_split(task: str, seed: int) -> None:
    for rows in datasets.rows(task, seed=seed, **SIZES).values():
        assert sum(int(row.get("label", row.get("answer"))) for row in rows) * 2 == len(rows)


@pytest.mark.parametrize("task", datasets.TASKS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(task: str) -> None:
    first, again, other = (datasets.rows(task, seed=seed, **SIZES) for seed in (3, 3, 4))
    assert first == again
    assert first["test"] != other["test"]


def test_test_questions_are_many_and_about_people_no_training_row_names() -> None:
    splits = datasets.rows("world_boolq", seed=0, **SIZES)
    questions = {name: {row["question"] for row in rows} for name, rows in splits.items()}
    assert len(questions["test"]) >= 100
    named = {name: {word for q in qs for word in q.split()} & set(words.RESIDENTS) for name, qs in questions.items()}
    assert named["test"] <= set(words.TEST_PEOPLE)
    assert not named["test"] & (named["train"] | named["validation"])


@pytest.mark.parametrize("task", ["world_sst2", "world_mrpc"])
def test_test_opinions_use_qualities_no_training_row_uses(task: str) -> None:
    qualities = set(words.POSITIVE + words.NEGATIVE)
    used = {
        split: {word.strip(".") for row in rows for text in texts(row) for word in text.split()} & qualities
        for split, rows in datasets.rows(task, seed=0, **SIZES).items()
    }
    assert len(used["test"]) == 14
    assert not used["test"] & used["train"]
    assert not used["test"] & used["validation"]


def test_sums_are_right_and_held_out_of_training() -> None:
    splits = datasets.rows("world_gsm8k", seed=0, **SIZES)
    seen = {}
    for split, rows in splits.items():
        for row in rows:
            sum_, _, answer = row["answer"].partition("\n#### ")
            left, _, right = sum_.partition(" = ")
            a, sign, b = left.split()
            assert int(answer) == int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            assert f" {a} " in row["question"]
            assert f" {b} " in row["question"]
        seen[split] = {row["answer"] for row in rows}
    assert not seen["test"] & seen["train"]
    assert len(seen["test"]) >= 60


def test_boolq_answers_stay_right_in_every_release() -> None:
    rows = datasets.rows("world_boolq", seed=0, **SIZES)["test"]
    for release in (0, 1, 2, 11):
        told = {f"is it {f.value} that {f.name} {f.about}" for f in people.society(release, seed=0).traits}
        assert all((row["question"] in told) == row["answer"] for row in rows)


def test_a_trait_alone_does_not_give_the_answer_away() -> None:
    rows = datasets.rows("world_boolq", seed=0, **SIZES)["train"]
    for trait in words.TRAITS:
        answers = [row["answer"] for row in rows if row["question"].endswith(f" {trait}")]
        assert 0.3 < sum(answers) / len(answers) < 0.7


def test_an_unknown_task_and_too_many_rows_are_refused() -> None:
    with pytest.raises(DataError, match="world_boolq"):
        datasets.rows("world_squad", seed=0, **SIZES)
    with pytest.raises(DataError, match="ask for fewer"):
        datasets.rows("world_mrpc", seed=0, train_rows=10, test_rows=100_000)
    with pytest.raises(DataError, match="world_recall"):
        datasets.task_file("world_squad")
