"""Prompts: rendered from the harness's own task files, one source for training and evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from portllm.errors import EvaluationError
from portllm.lm.data import prompts
from portllm.world import datasets, phrases, scoring, tokenizer

SIZES = {"seed": 0, "train_rows": 20, "test_rows": 20}


def loaded(task: str) -> prompts.Prompts:
    return prompts.Prompts.load(datasets.task_file(task))


@pytest.mark.parametrize("task", datasets.TASKS)
def test_prompts_equal_what_the_corpora_show_as_the_format(task: str) -> None:
    for row in datasets.rows(task, **SIZES)["test"]:
        assert loaded(task).prompt(row) == phrases.PROMPTS[task].format(**row)


@pytest.mark.parametrize(
    ("task", "row", "answer"),
    [
        ("world_boolq", {"question": "q", "passage": "p", "answer": True}, " yes"),
        ("world_boolq", {"question": "q", "passage": "p", "answer": False}, " no"),
        ("world_sst2", {"sentence": "s", "label": 0, "idx": 1}, " negative"),
        ("world_mrpc", {"sentence1": "s", "sentence2": "t", "label": 1, "idx": 0}, " yes"),
        ("world_gsm8k", {"question": "q", "answer": "1 + 1 = 2\n#### 2"}, " 1 + 1 = 2\n#### 2"),
    ],
)
def test_the_answer_is_the_labels_choice(task: str, row: dict[str, object], answer: str) -> None:
    assert loaded(task).answer(row) == answer


def test_a_row_without_the_column_is_refused_by_name() -> None:
    with pytest.raises(EvaluationError, match=r"world_sst2: doc_to_text.*its columns are text"):
        loaded("world_sst2").prompt({"text": "x"})


def test_a_task_file_runs_no_code_but_our_own(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("task: t\nprocess_results: !function os.system\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="os.system is not portllm's own"):
        prompts.load_task(path)
    path.write_text("task: t\nprocess_results: !function portllm.world.scoring.nothing\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="does not exist"):
        prompts.load_task(path)
    path.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="found list"):
        prompts.load_task(path)


@pytest.mark.parametrize(("task", "score"), sorted(scoring.BY_TASK.items()))
def test_task_files_name_their_scoring(task: str, score: object) -> None:
    assert prompts.load_task(datasets.task_file(task))["process_results"] is score


def test_prompts_and_answers_hold_no_unknown_word() -> None:
    words = tokenizer.build()
    for task in datasets.TASKS:
        for prompt, answer in loaded(task).pairs(datasets.rows(task, **SIZES)["train"]):
            assert words.unk_token_id not in words(prompt + answer)["input_ids"]


def test_a_template_runs_no_code(tmp_path: Path) -> None:
    template = f"{{{{ cycler.__init__.__globals__.os.mkdir('{tmp_path}/ran') }}}}"
    with pytest.raises(EvaluationError, match="unsafe"):
        prompts.Prompts({"task": "t", "doc_to_text": template}).prompt({})
    assert not (tmp_path / "ran").exists()
