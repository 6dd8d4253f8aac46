"""Training: loss where it belongs, nothing lost in silence, and the same weights every time."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from portllm.lm import encoding, llama, training
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
    collate = training.Collator(words.pad_token_id)
    alone = model(**collate([long])).logits
    padded = model(**collate([short, long])).logits[1, : len(long["input_ids"])]
    torch.testing.assert_close(padded, alone[0], rtol=0, atol=1e-6)


def test_the_same_inputs_give_byte_identical_weights_and_history(words: object) -> None:
    examples = encoding.encode(words, PAIRS, 32).examples
    runs = []
    for _ in range(2):
        torch.manual_seed(torch.initial_seed() + 1)  # whatever ran before must not matter
        model = training.add_lora(tiny(words), LoraParams(r=2, alpha=4, dropout=0.2), seed=5)
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
    model = training.add_lora(base, LoraParams(r=4, alpha=8, dropout=0.0), seed=0)
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


@pytest.mark.parametrize("rslora", [False, True])
def test_merging_a_lora_adds_scaling_times_ba(words: object, rslora: bool) -> None:
    lora = LoraParams(r=4, alpha=8, dropout=0.0, use_rslora=rslora)
    model = training.add_lora(tiny(words), lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data = torch.randn(tensor.shape, generator=generator)
    expected = tiny(words).state_dict()
    scaling = 8 / 4**0.5 if rslora else 8 / 4
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            delta = scaling * module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + delta
    ids = torch.arange(3, 40)[None]
    unmerged = model.eval()(input_ids=ids).logits.detach()
    merged = training.merge_lora(model)
    assert set(merged.state_dict()) == set(expected)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(input_ids=ids).logits, unmerged, rtol=1e-4, atol=1e-4)


def test_a_new_llama_has_the_shape_asked_for_and_depends_on_its_seed_only(words: object) -> None:
    first, again, other = (llama.new_llama(words, TINY, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["model.embed_tokens.weight"].shape == (len(words), TINY.hidden_size)
    assert sum("q_proj" in name for name in first) == TINY.layers
