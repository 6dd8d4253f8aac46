"""Counts from a config equal those of the model transformers builds; published shapes give the published counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from portllm.lm.sizing import models, shapes
from portllm.params import ALL_LINEARS, FetchParams, LoraParams

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"head_dim": 16}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 8}),
    ("gemma", {"head_dim": 16}),
    ("gemma2", {"head_dim": 16}),
]


def on_meta(kind: str, changes: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **changes))


@pytest.mark.parametrize(("kind", "changes"), CONFIGS)
def test_parameters_are_counted_as_transformers_does(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    from portllm.lm.learning.loading import add_lora

    model = on_meta(kind, changes)
    model.config.save_pretrained(tmp_path)
    shape = shapes.from_config(json.loads((tmp_path / "config.json").read_text()), "tiny")
    assert shape is not None
    assert shape.parameters == model.num_parameters()
    patched = add_lora(model, LoraParams(r=4), seed=0)
    assert shape.lora_parameters(4, ALL_LINEARS) == patched.num_parameters(only_trainable=True)


def test_published_shapes_have_the_published_counts() -> None:
    counts = {name: shape.parameters for name, shape in shapes.PUBLISHED.items()}
    assert counts["mistralai/Mistral-7B-v0.1"] == 7_241_732_096
    assert counts["meta-llama/Llama-2-7b-hf"] == 6_738_415_616
    assert counts["meta-llama/Llama-3.1-8B"] == 8_030_261_248
    assert counts["google/gemma-2-9b"] == 9_241_705_984
    # 20.97 million trainable parameters of the PortLLM paper
    assert shapes.PUBLISHED["mistralai/Mistral-7B-v0.1"].lora_parameters(8, ALL_LINEARS) == 20_971_520


def test_a_checkpoints_bytes_are_exact(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from portllm.checkpoint.files.headers import read_header

    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    model = models.describe(str(tmp_path), FetchParams())
    file = tmp_path / "model.safetensors"
    assert model.stored_bytes == file.stat().st_size
    assert model.shape is not None
    assert model.shape.stored_bytes == sum(t.nbytes for t in read_header(file).tensors.values())
    assert model.network_bytes == 0


def test_the_worlds_own_model_is_counted_without_making_it() -> None:
    from portllm.lm.learning.llama import new_llama
    from portllm.world import tokenizer

    fetch = FetchParams()
    shape = models.describe("world", fetch).shape
    assert shape is not None
    assert shape.parameters == new_llama(tokenizer.build(), fetch.architecture, 0).num_parameters()


def test_what_the_formulas_do_not_cover_is_not_guessed() -> None:
    assert shapes.from_config({"model_type": "mixtral", **SMALL}, "m") is None
    assert shapes.from_config({"model_type": "llama"}, "m") is None
