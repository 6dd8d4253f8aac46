"""Tiny models of every architecture that the port supports: two layers, seeded, saved as transformers saves them.

Every parameter is random, norms and biases too, so that none can be lost unseen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 48
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {**SMALL, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
UNTIED = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "tie_word_embeddings": False}
ROUTED = {**UNTIED, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_group": 2, "topk_group": 1,
}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class Architecture:
    """A tiny model and the names of its modules, as they are in memory."""

    model_type: str
    config: Mapping[str, Any]
    linears: tuple[str, ...] = (*ATTENTION, *MLP)
    query_value: tuple[str, ...] = ("q_proj", "v_proj")
    experts: tuple[str, ...] = ()
    router: str | None = None  # the router's parameter
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    norm: str = "norm"
    auto: str = "AutoModelForCausalLM"
    saved_as: str | None = None  # the class the base on disk is of, where it is another one
    shard_bytes: int | None = None
    hub_layout: bool = False  # without the prefix of the language-model class
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # tensors on disk that no class reads

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", True))

    @cached_property
    def auto_class(self) -> Any:
        """The class that users load such a checkpoint with."""
        import transformers

        return getattr(transformers, self.auto)

    def build(self, seed: int) -> Any:
        """The model as it is saved, every parameter drawn again."""
        import transformers

        config = transformers.AutoConfig.for_model(self.model_type, **self.config)
        model = getattr(transformers, self.saved_as or self.auto).from_config(config, dtype=torch.float32)
        model.config.architectures = [type(model).__name__]
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.data = 0.25 * noise
            else:  # a norm about one, a bias about zero
                parameter.data = (1.0 if bool((parameter == 1).all()) else 0.0) + 0.2 * noise
        return model.eval()

    def save(self, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
        """Write the checkpoint of `seed` into `folder`, in the layout of this architecture."""
        model = self.build(seed).to(dtype)
        inner = model.transformer if self.hub_layout else model
        inner.save_pretrained(folder, max_shard_size=self.shard_bytes or "1GB")
        if self.hub_layout:  # as gpt2 is published: the complete model's config next to the inner model's tensors
            model.config.save_pretrained(folder)
        if self.extra:
            self._add_extra(folder, dtype)
        return folder

    def _add_extra(self, folder: Path, dtype: torch.dtype) -> None:
        from safetensors.torch import load_file, save_file

        file = sorted(folder.glob("*.safetensors"))[-1]
        extra = {name: torch.ones(shape, dtype=dtype) for name, shape in self.extra.items()}
        save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            tree = json.loads(index.read_text())
            tree["weight_map"].update(dict.fromkeys(extra, file.name))
            index.write_text(json.dumps(tree, indent=2))


_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GPT2_NAMES: dict[str, Any] = {
    "linears": ("c_attn", "c_proj", "c_fc"), "query_value": ("c_attn",), "embedding": "wte", "norm": "ln_f",
}  # fmt: skip
_EXPERTS_ONLY: dict[str, Any] = {"linears": ATTENTION, "experts": EXPERTS}  # the other linears are inside the experts

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", UNTIED, shard_bytes=3000),
    "llama-tied": Architecture("llama", {**UNTIED, "tie_word_embeddings": True}),
    "llama-classifier": Architecture(
        "llama", {**UNTIED, "pad_token_id": 0}, auto="AutoModelForSequenceClassification",
        saved_as="AutoModelForCausalLM",
    ),
    "llama-scored": Architecture(  # the base on disk is a classifier already
        "llama", {**UNTIED, "pad_token_id": 0, "num_labels": 3}, auto="AutoModelForSequenceClassification"
    ),
    "mistral": Architecture("mistral", UNTIED, extra={"mtp.fc.weight": (3, 5)}),
    "qwen2": Architecture("qwen2", UNTIED, shard_bytes=4000, extra={"mtp.fc.weight": (3, 5)}),
    "qwen3": Architecture("qwen3", {**UNTIED, "head_dim": 8}),
    "gemma2": Architecture("gemma2", {**UNTIED, "head_dim": 8, "tie_word_embeddings": True}, shard_bytes=3000),
    "phi3": Architecture(
        "phi3", {**UNTIED, "pad_token_id": 0}, linears=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        query_value=("qkv_proj",),
    ),
    "gpt2": Architecture("gpt2", _GPT2, **_GPT2_NAMES),
    "gpt2-hub": Architecture(
        "gpt2", _GPT2, **_GPT2_NAMES, hub_layout=True, extra={f"h.{i}.attn.bias": (1, 1, 32, 32) for i in (0, 1)}
    ),
    "gpt2-classifier": Architecture(
        "gpt2", {**_GPT2, "pad_token_id": 0}, **_GPT2_NAMES, auto="AutoModelForSequenceClassification",
        saved_as="AutoModelForCausalLM",
    ),
    "gpt_neox": Architecture(
        "gpt_neox", {**SMALL, "intermediate_size": 24, "tie_word_embeddings": False},
        linears=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), query_value=("query_key_value",),
        embedding="embed_in", head="lm_head", norm="final_layer_norm",
    ),
    "phi": Architecture(  # a head with a bias
        "phi", {**UNTIED, "intermediate_size": 24}, linears=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        norm="final_layernorm",
    ),
    "ctrl": Architecture(  # a tied head with a bias
        "ctrl", {"vocab_size": VOCABULARY, "n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2, "n_positions": 64},
        linears=("Wq", "Wk", "Wv", "dense"), query_value=("Wq", "Wv"), embedding="w", norm="layernorm",
    ),
    "mixtral": Architecture(
        "mixtral", {**ROUTED, "num_local_experts": 4}, **_EXPERTS_ONLY, router="gate.weight", shard_bytes=3000
    ),
    "qwen2_moe": Architecture(
        "qwen2_moe",
        {**ROUTED, "num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
        linears=(*ATTENTION, *MLP, "shared_expert_gate"), experts=EXPERTS, router="gate.weight",
    ),
    "qwen3_moe": Architecture(
        "qwen3_moe", {**ROUTED, "num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8}, **_EXPERTS_ONLY,
        router="gate.weight", shard_bytes=3000,
    ),
    "olmoe": Architecture("olmoe", {**ROUTED, "num_experts": 4}, **_EXPERTS_ONLY, router="gate.weight"),
    "deepseek_v3": Architecture(
        "deepseek_v3",
        {**ROUTED, **LATENT, "n_routed_experts": 4, "moe_intermediate_size": 12, "n_shared_experts": 1,
         "first_k_dense_replace": 1},
        linears=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        query_value=("q_b_proj", "kv_b_proj"), experts=EXPERTS, router="gate.weight", shard_bytes=2000,
    ),
    "granitemoe": Architecture(
        "granitemoe", {**ROUTED, "num_local_experts": 4}, **_EXPERTS_ONLY, router="router.weight"
    ),
    "gpt_oss": Architecture(
        "gpt_oss", {**ROUTED, "num_local_experts": 4, "head_dim": 8}, **_EXPERTS_ONLY, router="router.weight"
    ),
    "llama4": Architecture(
        "llama4_text",
        {**ROUTED, "num_local_experts": 4, "intermediate_size": 12, "intermediate_size_mlp": 24, "head_dim": 8,
         "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
        linears=(*ATTENTION, *MLP), experts=EXPERTS, router="router.weight",
    ),
    "llava": Architecture(  # of text alone: its language model is renamed on disk
        "llava",
        {
            "text_config": {"model_type": "llama", **UNTIED}, "image_token_index": 0, "tie_word_embeddings": False,
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16,
            },
        },
        auto="AutoModelForImageTextToText",
    ),
    "t5": Architecture(
        "t5",
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        linears=("q", "k", "v", "o", "wi", "wo"), query_value=("q", "v"), embedding="shared", norm="final_layer_norm",
        auto="AutoModelForSeq2SeqLM",
    ),
}  # fmt: skip
