"""A patch leaves the base as it was; after any patch, the base is the same, or is reloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from portllm.errors import EvaluationError
from portllm.lm.data import tasks
from portllm.lm.learning import llama
from portllm.lm.scoring import evaluation, questions
from portllm.lm.scoring.questions import Questions
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

    facts = [{"sentence": f"Anna likes {word}", "label": i % 2, "idx": i} for i, word in enumerate(["tea", "cake"])]
    (tmp_path / "sst2").mkdir()
    pq.write_table(pa.Table.from_pylist(facts), tmp_path / "sst2" / "validation.parquet")
    return tmp_path


def sst2(data: Path) -> Any:
    return questions.load_tasks([tasks.spec("sst2", data)], EvaluateParams())["sst2"]


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
    task = sst2(data)
    before = harness.score(task)
    with harness.patched(patch(tmp_path / "head", checkpoint, modules_to_save=["lm_head"])):
        headed = harness.score(task)
    assert harness.score(task) == before
    with harness.patched(patch(tmp_path / "plain", checkpoint)):
        patched = harness.score(task)
    assert harness.score(task) == before
    assert len({one.documents[0].loglikelihoods for one in (before, headed, patched)}) == 3
    assert len(before.documents[0].loglikelihoods) == 2


def test_a_base_that_a_patch_has_written_into_is_freed_before_it_is_reloaded(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    biased = patch(tmp_path / "biased", checkpoint, bias="all")
    inner, alive = evaluation.load_model, []

    def loading(*rest: Any, **settings: Any) -> Any:
        assert all(one() is None for one in alive), "two bases at once"
        model, words = inner(*rest, **settings)
        alive.append(weakref.ref(model))
        return model, words

    monkeypatch.setattr(evaluation, "load_model", loading)
    gc.disable()  # nothing is freed by chance
    try:
        harness = evaluation.Harness(checkpoint, EvaluateParams(threads=1))
        with harness.patched(biased):
            harness.score(sst2(data))
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
    with (
        pytest.raises(EvaluationError, match="is it for this base"),
        harness.patched(patch(tmp_path / "p", other)),
    ):
        pass


def test_peft_s_refusal_names_the_tensor(checkpoint: Path, tmp_path: Path) -> None:
    """issue 8, item 15: of a list under a heading, the heading alone says nothing."""
    folder = patch(tmp_path / "p", checkpoint)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    harness = evaluation.Harness(checkpoint, EvaluateParams(threads=1))
    with (
        pytest.raises(EvaluationError, match=r"size mismatch for .*lora_A.*is it for this base"),
        harness.patched(folder),
    ):
        pass


def test_a_model_that_gives_nan_is_not_scored(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """issue 8, item 1."""
    import torch

    broken = tmp_path / "broken"
    model, words = evaluation.load_model(checkpoint)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    words.save_pretrained(broken)
    harness = evaluation.Harness(broken, EvaluateParams(threads=1))
    with pytest.raises(EvaluationError, match=r"^sst2: the log-likelihood of .* is nan; expected finite numbers"):
        harness.score(sst2(data))


LINEARS = ["q_proj", "down_proj"]
CASES = {
    "plain": ({}, True),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, True),
    "tokens": ({"trainable_token_indices": [1, 2]}, True),
    "dora": ({"use_dora": True}, True),
    "pissa": ({"init_lora_weights": "pissa"}, False),
    "biases": ({"bias": "all"}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_base_is_as_it_was_or_is_to_be_reloaded(case: str, tmp_path: Any) -> None:
    import copy

    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    settings, restored = CASES[case]
    shape = ArchitectureParams(hidden_size=16, intermediate_size=16, layers=1, heads=1)
    base = llama.new_llama(tokenizer.build(), shape, seed=0).eval()
    ids = torch.arange(8)[None]
    trained = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=LINEARS, **settings))
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(0.1)
        trained.save_pretrained(tmp_path)
        before, weights = base(ids).logits, copy.deepcopy(base.state_dict())
        state = evaluation.State.of(base)
        patched = PeftModel.from_pretrained(base, str(tmp_path)).eval()
        assert not torch.equal(patched(ids).logits, before)
        assert state.restore(base, patched) is restored
        if restored:
            assert torch.equal(base(ids).logits, before)
            assert {k: torch.equal(v, weights[k]) for k, v in base.state_dict().items()} == dict.fromkeys(weights, True)


def test_a_weight_written_to_is_noticed() -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    shape = ArchitectureParams(hidden_size=16, intermediate_size=16, layers=1, heads=1)
    base = llama.new_llama(tokenizer.build(), shape, seed=0)
    state = evaluation.State.of(base)
    patched = get_peft_model(base, LoraConfig(r=2, target_modules=LINEARS))
    with torch.no_grad():
        base.get_input_embeddings().weight[0, 0] += 1
    assert state.restore(base, patched) is False


def test_a_perplexity_that_no_number_holds_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    """issue 8, item 1: the harness's exp() overflows, which was a traceback."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    corpus = tmp_path / "v1"
    corpus.mkdir()
    pq.write_table(pa.Table.from_pylist([{"text": "Anna likes tea"}]), corpus / "test.parquet")
    model, words = evaluation.load_model(checkpoint)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "loud")
    words.save_pretrained(tmp_path / "loud")
    harness = evaluation.Harness(tmp_path / "loud", EvaluateParams(threads=1))
    (task,) = Questions([], data=None, news=corpus).load(
        ["corpus_v1_perplexity"], {}, harness.tokenizer, EvaluateParams()
    ).values()  # fmt: skip
    with pytest.raises(EvaluationError, match=r"corpus_v1_perplexity: the harness cannot score loud \(.*range"):
        harness.score(task)
