"""Training: loss where it belongs, nothing lost in silence, and the same weights every time."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from portllm.errors import CheckpointError, ParamsError
from portllm.lm.data import encoding
from portllm.lm.learning import batches, llama, loading, snapshots, training
from portllm.params import ArchitectureParams, LoraParams, OptimParams
from portllm.world import tokenizer

TINY = ArchitectureParams(hidden_size=16, intermediate_size=32, layers=2, heads=2)
OPTIM = OptimParams(learning_rate=1e-2, max_steps=6, batch_size=4, logging_steps=2, schedule="cosine", threads=1)
PAIRS = [
    ("The school opens at nine.\nAnswer:", " yes"),
    ("Answer:", " no"),
    ("Question: has Anna 5 coins?\nAnswer:", " 5 - 2 = 3"),
]


@pytest.fixture(scope="module")
def words() -> object:
    return tokenizer.build()


def tiny(words: object) -> torch.nn.Module:
    return llama.new_llama(words, TINY, seed=0)


def test_padding_does_not_change_the_loss_of_a_row(words: object) -> None:
    model = tiny(words).eval()
    short, long = encoding.encode(words, PAIRS[:2], 32).examples
    collate = batches.Collator(words.pad_token_id)
    alone = model(**collate([long])).logits
    padded = model(**collate([short, long])).logits[1, : len(long["input_ids"])]
    torch.testing.assert_close(padded, alone[0], rtol=0, atol=1e-6)


def test_the_same_inputs_give_byte_identical_weights_and_history(words: object) -> None:
    examples = encoding.encode(words, PAIRS, 32).examples
    runs = []
    for _ in range(2):
        torch.manual_seed(torch.initial_seed() + 1)  # whatever ran before must not matter
        model = loading.add_lora(tiny(words), LoraParams(r=2, alpha=4, dropout=0.2), seed=5)
        history = training.fit(model, words, examples, optim=OPTIM, seed=5).history
        runs.append((history, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
    (history, weights), (again, same) = runs
    assert history == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert [row["step"] for row in history] == [2, 4, 6]
    assert set(history[0]) == {"step", "loss", "learning_rate"}


def test_only_the_lora_learns_and_loss_falls(words: object) -> None:
    base = tiny(words)
    before = copy.deepcopy(base.state_dict())
    model = loading.add_lora(base, LoraParams(r=4, alpha=8, dropout=0.0), seed=0)
    heard: list[tuple[int, float]] = []
    training.fit(
        model,
        words,
        encoding.encode(words, PAIRS, 32).examples,
        optim=dataclasses.replace(OPTIM, max_steps=30, logging_steps=10),
        seed=0,
        on_metrics=lambda step, row: heard.append((step, row["loss"])),
    )
    assert [step for step, _ in heard] == [10, 20, 30]
    assert heard[-1][1] < heard[0][1] - 0.3
    frozen = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(frozen[name], tensor) for name, tensor in before.items())


def test_a_new_llama_has_the_shape_asked_for_and_depends_on_its_seed_only(words: object) -> None:
    first, again, other = (llama.new_llama(words, TINY, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["model.embed_tokens.weight"].shape == (len(words), TINY.hidden_size)
    assert sum("q_proj" in name for name in first) == TINY.layers


def trained(words: object, optim: OptimParams, folder: Path | None = None, stop: int = 0) -> dict[str, torch.Tensor]:
    """The trained weights of one training, with its losses as `loss`."""
    model = loading.add_lora(tiny(words), LoraParams(r=2, alpha=4, dropout=0.2), seed=5)

    def progress(step: int, _: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    examples = encoding.encode(words, PAIRS * 3, 32).examples
    done = training.fit(model, words, examples, optim=optim, seed=5, checkpoints=folder, on_progress=progress)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {**weights, "loss": torch.tensor([row["loss"] for row in done.history])}


@pytest.mark.parametrize("stop", [3, 5, 6])
def test_a_training_resumed_is_the_training_undisturbed(words: object, tmp_path: Path, stop: int) -> None:
    """Stopped between two log lines, at the end of an epoch, and again after a resumption."""
    optim = dataclasses.replace(OPTIM, max_steps=9, save_steps=1, warmup_ratio=0.2, batch_size=3)
    whole = trained(words, optim)
    for moment in (stop, stop + 2):
        with pytest.raises(KeyboardInterrupt):
            trained(words, optim, tmp_path, stop=moment)
    resumed = trained(words, optim, tmp_path)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(whole["loss"]) == 5  # steps 2, 4, 6, 8 and the last


def test_what_is_told_before_a_resumption_is_told_again(words: object, tmp_path: Path) -> None:
    optim = dataclasses.replace(OPTIM, save_steps=3)
    with pytest.raises(KeyboardInterrupt):
        trained(words, optim, tmp_path, stop=5)
    heard: list[int] = []
    notes: list[str] = []
    model = loading.add_lora(tiny(words), LoraParams(r=2, alpha=4, dropout=0.2), seed=5)
    training.fit(
        model, words, encoding.encode(words, PAIRS * 3, 32).examples, optim=optim, seed=5, checkpoints=tmp_path,
        on_metrics=lambda step, _: heard.append(step), on_note=notes.append,
    )  # fmt: skip
    assert heard == [2, 4, 6]
    assert notes == ["going on after step 3, where an earlier run was stopped"]


def test_what_was_resumed_from_is_let_go(words: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a snapshot are as large as the model."""
    optim = dataclasses.replace(OPTIM, save_steps=3)
    with pytest.raises(KeyboardInterrupt):
        trained(words, optim, tmp_path, stop=5)
    read: list[weakref.ref[torch.Tensor]] = []
    inner = snapshots.Snapshots.newest

    def newest(self: snapshots.Snapshots) -> snapshots.Snapshot | None:
        found = inner(self)
        assert found is not None
        read.extend(weakref.ref(tensor) for name, tensor in found.tensors.items() if name.startswith("model."))
        return found

    monkeypatch.setattr(snapshots.Snapshots, "newest", newest)
    alive: list[bool] = []
    model = loading.add_lora(tiny(words), LoraParams(r=2, alpha=4, dropout=0.2), seed=5)
    training.fit(
        model, words, encoding.encode(words, PAIRS * 3, 32).examples, optim=optim, seed=5, checkpoints=tmp_path,
        on_progress=lambda *_: alive.append(any(one() is not None for one in read)),
    )  # fmt: skip
    assert read
    assert alive == [False] * 3


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 8), (2, 4)])
def test_a_schedule_decays_as_well_where_epochs_say_how_long(words: object, accumulated: int, steps: int) -> None:
    optim = dataclasses.replace(
        OPTIM, schedule="warmup_stable_decay", max_steps=0, epochs=4, batch_size=6, gradient_accumulation=accumulated,
        decay_ratio=0.5, logging_steps=1,
    )  # fmt: skip
    examples = encoding.encode(words, PAIRS * 3, 32).examples
    rates = [row["learning_rate"] for row in training.fit(tiny(words), words, examples, optim=optim, seed=0).history]
    assert len(rates) == steps
    assert rates[: steps // 2] == [OPTIM.learning_rate] * (steps // 2)
    assert 0 < rates[-1] < OPTIM.learning_rate


def test_one_process_computes_on_one_gpu_of_many(words: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.nn.DataParallel.__init__", lambda *_, **__: pytest.fail("split over all GPUs"))
    examples = encoding.encode(words, PAIRS, 32).examples
    optim = dataclasses.replace(OPTIM, max_steps=1, logging_steps=1)
    assert len(training.fit(tiny(words), words, examples, optim=optim, seed=0).history) == 1


def test_a_token_that_the_base_does_not_know_is_said(words: object) -> None:
    small = tiny(words)
    examples = encoding.encode(words, PAIRS, 32).examples
    highest = max(max(example["input_ids"]) for example in examples)
    small.resize_token_embeddings(highest + 1)
    optim = dataclasses.replace(OPTIM, max_steps=1)
    training.fit(small, words, examples, optim=optim, seed=0)  # what the text never comes to may be missing
    small.resize_token_embeddings(highest)
    with pytest.raises(CheckpointError, match=f"token {highest} of the text, the model has tokens 0 to {highest - 1}"):
        training.fit(small, words, examples, optim=optim, seed=0)


def test_accumulated_batches_are_one_large_batch(words: object) -> None:
    """Rows of different lengths: each token counts alike, in whichever batch it comes."""
    examples = encoding.encode(words, PAIRS * 4, 32).examples
    optim = dataclasses.replace(OPTIM, max_steps=4, logging_steps=1)
    histories = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        model = loading.add_lora(tiny(words), LoraParams(r=2, alpha=4, dropout=0.0), seed=5)
        one = dataclasses.replace(optim, batch_size=batch, gradient_accumulation=accumulated)
        histories.append([row["loss"] for row in training.fit(model, words, examples, optim=one, seed=5).history])
    assert histories[1] == pytest.approx(histories[0], rel=1e-5)
    assert histories[2] == pytest.approx(histories[0], rel=1e-5)


def test_recomputed_activations_change_no_weight(words: object) -> None:
    """The same numbers are computed twice rather than kept, dropout included."""
    plain, recomputed = (trained(words, dataclasses.replace(OPTIM, gradient_checkpointing=on)) for on in (False, True))
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_bf16_trains_an_fp32_lora_on_a_bf16_base(words: object, tmp_path: Path) -> None:
    tiny(words).save_pretrained(tmp_path)
    optim = dataclasses.replace(OPTIM, precision="bf16", max_steps=30, logging_steps=10)
    base = loading.frozen_base(tmp_path, optim)
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    model = loading.add_lora(base, LoraParams(r=4, alpha=8, dropout=0.0), seed=0)
    history = training.fit(model, words, encoding.encode(words, PAIRS, 32).examples, optim=optim, seed=0).history
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    assert history[-1]["loss"] < history[0]["loss"] - 0.3
    assert {p.dtype for p in loading.trainable_base(tmp_path, optim).parameters()} == {torch.float32}


SHAPE: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "mistral": ("MistralConfig", {"sliding_window": 6}, "sdpa"),
    "llama 3": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "sdpa"),
    "gemma 2": ("Gemma2Config", {"sliding_window": 6, "query_pre_attn_scalar": 8}, "eager"),
    "qwen 3": ("Qwen3Config", {"tie_word_embeddings": True}, "sdpa"),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # between PEFT and transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_whatever_its_rows_are_padded_with(family: str, words: object, tmp_path: Path) -> None:
    """Its own attention, a sliding window shorter than the rows, no token for padding."""
    import transformers

    name, more, attention = FAMILIES[family]
    config = getattr(transformers, name)(**SHAPE, **more, pad_token_id=None)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    optim = dataclasses.replace(OPTIM, max_steps=20, logging_steps=5, group_by_length=True)
    base = loading.frozen_base(tmp_path, optim)
    assert base.config._attn_implementation == attention
    examples = encoding.encode(words, PAIRS, 32).examples
    collate = batches.Collator(0)
    padded = collate(examples)
    with torch.no_grad():
        for i, example in enumerate(examples):
            labels = torch.full_like(padded["labels"], encoding.IGNORED)
            labels[i] = padded["labels"][i]
            together = base(input_ids=padded["input_ids"], labels=labels).loss
            torch.testing.assert_close(together, base(**collate([example])).loss, rtol=1e-5, atol=1e-6)

    model = loading.add_lora(base, LoraParams(r=4, alpha=8, dropout=0.0), seed=0)
    tokenizer = copy.copy(words)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    history = training.fit(model, tokenizer, examples, optim=optim, seed=0).history
    assert history[-1]["loss"] < history[0]["loss"] - 0.1
    model.save_pretrained(tmp_path / "patch")
    again = PeftModel.from_pretrained(loading.frozen_base(tmp_path, optim), tmp_path / "patch").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**padded).loss, model(**padded).loss)


def test_training_that_diverges_ends_at_the_step_and_names_the_rate(words: object) -> None:
    """Issue 8, item 1: before any row of the history would show it."""
    optim = dataclasses.replace(OPTIM, learning_rate=1e30, max_steps=40, logging_steps=100, schedule="constant")
    model = loading.add_lora(tiny(words), LoraParams(r=2, alpha=4, dropout=0.0), seed=5)
    steps: list[int] = []
    examples = encoding.encode(words, PAIRS, 32).examples
    with pytest.raises(ParamsError, match=r"expected a finite gradient norm, found (nan|inf)") as caught:
        training.fit(model, words, examples, optim=optim, seed=5, on_progress=lambda step, _: steps.append(step))
    assert f"training stopped at step {len(steps) + 1} of 40" in str(caught.value)
    assert "lower optim.learning_rate (now 1e+30)" in str(caught.value)
    assert len(steps) < 5


def test_base_with_a_weight_that_is_not_finite_ends_the_first_step(words: object) -> None:
    """Issue 8, item 1: the learning rate is not to blame."""
    model = tiny(words)
    model.model.norm.weight.data[3] = float("nan")
    examples = encoding.encode(words, PAIRS, 32).examples
    with pytest.raises(ParamsError, match=r"stopped at step 1 of 6: .*, found nan; check the base's weights"):
        training.fit(model, words, examples, optim=OPTIM, seed=5)


def test_weight_that_overflows_in_the_last_step_is_an_error(words: object) -> None:
    """Issue 8, item 1: no later step would show it."""
    examples = encoding.encode(words, PAIRS, 32).examples
    optim = dataclasses.replace(OPTIM, learning_rate=1e36, max_steps=1, schedule="constant")
    assert len(training.fit(tiny(words), words, examples, optim=optim, seed=5).history) == 1
    optim = dataclasses.replace(optim, learning_rate=1e38)
    with pytest.raises(ParamsError, match=r"step 1 of 1: expected a finite model\..*, found (nan|-?inf); lower optim"):
        training.fit(tiny(words), words, examples, optim=optim, seed=5)


def test_the_last_step_has_a_row_in_the_history(words: object) -> None:
    """Issue 8, item 1: the mean loss since the row before, also where logging_steps does not divide the steps."""
    examples = encoding.encode(words, PAIRS, 32).examples
    histories = []
    for logging_steps in (1, 3, 100):
        optim = dataclasses.replace(OPTIM, max_steps=5, logging_steps=logging_steps)
        rows: list[int] = []
        fitted = training.fit(
            tiny(words), words, examples, optim=optim, seed=5, on_metrics=lambda step, _, rows=rows: rows.append(step)
        )
        assert rows == [row["step"] for row in fitted.history]
        assert fitted.loss == fitted.history[-1]["loss"]
        histories.append([(row["step"], row["loss"]) for row in fitted.history])
    each = [loss for _, loss in histories[0]]
    for history, expected in zip(histories[1:], ([(3, each[:3]), (5, each[3:])], [(5, each)]), strict=True):
        assert [step for step, _ in history] == [step for step, _ in expected]
        for (_, loss), (_, losses) in zip(history, expected, strict=True):
            assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_model_that_takes_no_number_of_targets_learns_the_same(words: object, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = encoding.encode(words, PAIRS * 4, 32).examples
    optim = dataclasses.replace(OPTIM, gradient_accumulation=2, logging_steps=1)
    losses = []
    for takes in (True, False):
        monkeypatch.setattr("transformers.LlamaForCausalLM.accepts_loss_kwargs", takes, raising=False)
        losses.append([row["loss"] for row in training.fit(tiny(words), words, examples, optim=optim, seed=5).history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
