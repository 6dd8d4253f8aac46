"""A layout is right when the parts it names, put together, are the model transformers loads, element by element."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.checkpoint.layout import Layout
from portllm.checkpoint.reader import Checkpoint
from portllm.errors import CheckpointError
from portllm.lm.layout import built
from portllm.lm.quiet import quieten

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {
    **SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
HEADED = {**TEXT, "head_dim": 4}
MOE: dict[str, Any] = {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT: dict[str, Any] = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip

# class, settings of its config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", TEXT),
    "llama tied": ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "llama classifier": ("LlamaForSequenceClassification", {**TEXT, "num_labels": 3}),
    "llama bare": ("LlamaModel", TEXT),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "gpt_neox tied": ("GPTNeoXForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", {**TEXT, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 1}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**MOE, "head_dim": 4, "decoder_sparse_step": 1}),
    "olmoe": ("OlmoeForCausalLM", {**TEXT, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**TEXT, **LATENT}),
    "granitemoe": ("GraniteMoeForCausalLM", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssForCausalLM", {**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": ("Llama4ForCausalLM", {**HEADED, "intermediate_size_mlp": 20, "num_local_experts": 4}),
    "t5": ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": True}),
    "t5 untied": ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}),
    "bart": ("BartForConditionalGeneration", BART),
    "gemma2": ("Gemma2ForCausalLM", HEADED),
    "gemma3": ("Gemma3ForCausalLM", HEADED),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> None:
    quieten()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Checkpoint]:
    """save(class name, settings, shards="4KB"): a seeded model of that class, saved by transformers."""
    import transformers

    def make(name: str, settings: Mapping[str, Any], shards: str = "4KB") -> Checkpoint:
        model_class = getattr(transformers, name)
        config = model_class.config_class(**settings)
        torch.manual_seed(7)
        model = model_class(config).to(torch.float32)
        for parameter in model.parameters():  # norms and biases are all ones and zeros: make each element its own
            torch.nn.init.normal_(parameter)
        folder = tmp_path / "base"
        model.save_pretrained(folder, max_shard_size=shards)
        return Checkpoint.open(folder)

    return make


def loaded(base: Checkpoint, name: str = "") -> dict[str, torch.Tensor]:
    """What transformers loads: each parameter and stored buffer by its name."""
    import transformers

    model_class = getattr(transformers, name or base.config["architectures"][0])
    model = model_class.from_pretrained(base.path, dtype=torch.float32)
    return dict(model.state_dict(keep_vars=True))


def assembled(base: Checkpoint, layout: Layout, parameter: str, shape: torch.Size) -> torch.Tensor:
    """A parameter put together from its parts; NaN where nothing is, and an error where two parts meet."""
    value = torch.full(shape, torch.nan)
    for part in layout.parts[parameter]:
        at = tuple(i if isinstance(i, int) else slice(*i) for i in part.at)
        block = base.read(part.tensor)[tuple(slice(*span) for span in part.of)].to(torch.float32)
        block = block.mT if part.transposed else block
        assert value[at].shape == block.shape
        assert value[at].isnan().all(), f"{parameter}: two parts at {part.at}"
        value[at] = block
    return value


def assert_right(base: Checkpoint, layout: Layout, memory: Mapping[str, torch.Tensor]) -> None:
    """Every parameter in memory is what its parts, or those of the one it is tied to, make."""
    assert not layout.opaque
    for name, value in memory.items():
        kept = layout.tied.get(name, name)
        assert torch.equal(assembled(base, layout, kept, value.shape), value.detach()), name
    own = {
        f"{module}.{key}".lstrip("."): shape
        for module, m in layout.modules.items()
        for key, shape in m.parameters.items()
    }
    assert own == {name: tuple(value.shape) for name, value in memory.items()}
    assert layout.parts.keys() <= memory.keys()
    assert_ties(layout, memory)


def assert_ties(layout: Layout, memory: Mapping[str, torch.Tensor]) -> None:
    """Two names are tied exactly when they are one parameter in memory."""
    groups: dict[int, set[str]] = {}
    for name, value in memory.items():
        groups.setdefault(id(value), set()).add(name)
    found: dict[str, set[str]] = {}
    for name in memory:
        found.setdefault(layout.tied.get(name, name), set()).add(name)
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, groups.values()))


@pytest.mark.parametrize("model", MODELS)
def test_parts_make_the_model_that_transformers_loads(model: str, save: Callable[..., Checkpoint]) -> None:
    base = save(*MODELS[model])
    layout = built(base)
    assert layout.architecture == MODELS[model][0]
    assert len(base.shards) > 3
    assert_right(base, layout, loaded(base))
