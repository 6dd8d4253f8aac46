"""Tasks as the harness would load them, asked of every patch alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from portllm.errors import EvaluationError
from portllm.lm.data import tasks
from portllm.lm.learning import llama
from portllm.lm.scoring import evaluation
from portllm.params import ArchitectureParams, EvaluateParams
from portllm.world import tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sums = [{"question": f"what is {i} plus 1", "answer": f"it is {i + 1} #### {i + 1}"} for i in range(12)]
    facts = [
        {"sentence": f"Anna likes {word}", "label": i % 2, "idx": i} for i, word in enumerate(["tea", "cake", "rain"])
    ]
    for task, split, rows in [("gsm8k", "train", sums), ("gsm8k", "test", sums[:3]), ("sst2", "validation", facts),
                              ("sst2", "train", facts)]:  # fmt: skip
        (tmp_path / task).mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / task / f"{split}.parquet")
    return tmp_path


def load(name: str, data: Path, **params: Any) -> Any:
    return evaluation.load_tasks([tasks.spec(name, data)], EvaluateParams(**params))[name]


def prompts(task: Any) -> list[str]:
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [request.args[0] for request in task.instances]


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (3, 3), (-1, 5)])
def test_examples_in_the_prompt_are_as_many_as_asked(data: Path, asked: int, given: int) -> None:
    made = prompts(load("gsm8k", data, num_fewshot=asked))
    assert [text.count("Question:") for text in made] == [given + 1] * 3


def test_the_same_examples_every_time_a_task_is_asked(data: Path) -> None:
    task = load("gsm8k", data, num_fewshot=3)
    first = prompts(task)
    assert len(set(first)) == 3
    assert prompts(task) == first == prompts(load("gsm8k", data, num_fewshot=3))
    assert prompts(load("gsm8k", data, num_fewshot=3, seed=1)) != first


def test_requests_given_out_again_hold_no_old_answer(data: Path) -> None:
    task = load("sst2", data)
    prompts(task)
    task.instances[0].resps.append((-1.0, True))
    prompts(task)
    assert all(request.resps == [] for request in task.instances)


def test_how_many_documents_are_asked(data: Path) -> None:
    task = load("sst2", data)
    assert [evaluation.documents(task, EvaluateParams(limit=n)) for n in (0, 2, 9)] == [3, 2, 3]
    assert (evaluation.asked_split(task), evaluation.asked_split(load("gsm8k", data))) == ("validation", "test")


def test_a_task_nobody_knows_is_an_error(data: Path) -> None:
    with pytest.raises(EvaluationError, match=r"sst3.*did you mean"):
        evaluation.load_tasks([tasks.spec("sst3", data)], EvaluateParams())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    shape = ArchitectureParams(hidden_size=16, intermediate_size=16, layers=1, heads=1)
    words = tokenizer.build()
    llama.new_llama(words, shape, seed=0).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def patch(folder: Path, checkpoint: Path, **config: Any) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model

    model, _ = evaluation.load_model(checkpoint)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **config))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "modules_to_save" in name:
                p.neg_()
    adapted.save_pretrained(folder)
    return folder


def test_a_patch_leaves_the_base_as_it_was(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    harness = evaluation.Harness(checkpoint, EvaluateParams(threads=1))
    task = load("sst2", data)
    before = harness.score(task)
    with harness.patched(patch(tmp_path / "head", checkpoint, modules_to_save=["lm_head"])):
        headed = harness.score(task)
    assert harness.score(task) == before
    with harness.patched(patch(tmp_path / "plain", checkpoint)):
        patched = harness.score(task)
    assert harness.score(task) == before
    assert len({one.samples[0].loglikelihoods for one in (before, headed, patched)}) == 3
    assert len(before.samples[0].loglikelihoods) == 2


def test_a_base_a_patch_has_written_into_is_let_go_before_it_is_loaded_anew(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    made = patch(tmp_path / "biased", checkpoint, bias="all")
    inner, alive = evaluation.load_model, []

    def loading(*rest: Any, **told: Any) -> Any:
        assert all(one() is None for one in alive), "two bases at once"
        model, words = inner(*rest, **told)
        alive.append(weakref.ref(model))
        return model, words

    monkeypatch.setattr(evaluation, "load_model", loading)
    gc.disable()  # nothing is freed by chance
    try:
        harness = evaluation.Harness(checkpoint, EvaluateParams(threads=1))
        with harness.patched(made):
            harness.score(load("sst2", data))
    finally:
        gc.enable()
    assert len(alive) == 2


def test_a_patch_of_another_shape_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "wide"
    words = tokenizer.build()
    shape = ArchitectureParams(hidden_size=32, intermediate_size=16, layers=1, heads=1)
    llama.new_llama(words, shape, seed=0).save_pretrained(other)
    words.save_pretrained(other)
    harness = evaluation.Harness(checkpoint, EvaluateParams(threads=1))
    with pytest.raises(EvaluationError, match="was it made for it"), harness.patched(patch(tmp_path / "p", other)):
        pass
