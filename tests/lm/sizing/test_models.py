"""A model is counted without its weights: from params.yaml, a directory, the hub's stand-in, or a published config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from portllm.errors import CheckpointError
from portllm.lm.remote.hub import resolve
from portllm.lm.sizing import models
from portllm.params import ALL_LINEARS, ArchitectureParams, FetchParams, LoraParams

pytestmark = pytest.mark.filterwarnings("ignore")  # the hub's library warns of its own affairs

CONFIG = {
    "model_type": "mistral", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
REPO = "mistralai/Mistral-7B-v0.1"
FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": bytes(5000), "pytorch_model.bin": bytes(9000)}


def test_describe_of_a_hub_id_downloads_sizes_and_the_config_only(hub: Any) -> None:
    commit = hub.add(REPO, FILES)
    model = models.describe(REPO, FetchParams())
    assert model.origin == f"the hub at {commit[:12]}"
    assert model.size is not None
    assert model.size.widths is not None
    assert (model.size.widths.layers, model.size.dtype_bytes) == (1, 2)
    assert 5000 <= model.network_bytes < 9000, "pickled weights are not downloaded"
    assert hub.ranges == [], "no weights were asked for"
    resolve(REPO)
    assert models.describe(REPO, FetchParams()).network_bytes == 0


def test_describe_of_a_gated_model_raises(hub: Any) -> None:
    hub.add(REPO, FILES, gated=True)
    with pytest.raises(CheckpointError, match="gated"):
        models.describe(REPO, FetchParams())


def test_published_counts_known_models_only() -> None:
    mistral, unknown = models.published(REPO + "@main"), models.published("owner/name")
    assert mistral.size is not None
    assert mistral.size.parameters == 7_241_732_096
    assert mistral.network_bytes == mistral.stored_bytes == 2 * 7_241_732_096
    assert (unknown.size, unknown.stored_bytes) == (None, None)


def test_describe_of_a_pretrained_model_has_the_shape_of_its_params() -> None:
    fetch = FetchParams(vocab_size=512, architecture=ArchitectureParams(hidden_size=16, layers=3))
    size = models.describe("scratch", fetch).size
    assert size is not None
    assert size.widths is not None
    assert (size.vocabulary, size.widths.layers, size.widths.hidden) == (512, 3, 16)
    with pytest.raises(CheckpointError, match="neither a directory nor a hub id"):
        models.describe("a/b/c", fetch)


SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 32}
PHI = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
# (model_type, config, targets of LoRA, whether the formulas for activations and times fit)
CONFIGS: list[tuple[str, dict[str, Any], tuple[str, ...], bool]] = [
    ("llama", SMALL, ALL_LINEARS, True),
    ("llama", {**SMALL, "tie_word_embeddings": True}, (*ALL_LINEARS, "lm_head"), True),
    ("mistral", {**SMALL, "head_dim": 16}, ALL_LINEARS, True),
    ("qwen2", SMALL, ("q_proj", "layers.1.mlp.up_proj"), True),
    ("qwen3", {**SMALL, "head_dim": 8}, ALL_LINEARS, True),
    ("gemma", {**SMALL, "head_dim": 16}, ALL_LINEARS, True),
    ("gemma2", {**SMALL, "head_dim": 16}, ALL_LINEARS, True),
    ("mixtral", {**SMALL, "num_local_experts": 4}, ("q_proj", "v_proj"), False),
    ("qwen3_moe", {**SMALL, "num_experts": 4, "moe_intermediate_size": 16}, ("k_proj",), False),
    ("gpt2", GPT2, ("c_attn", "c_proj", "wte"), False),
    ("gpt_neox", SMALL, ("query_key_value", "dense_4h_to_h"), False),
    ("phi", PHI, ("q_proj", "fc1"), False),
]


def on_meta(kind: str, config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))


@pytest.mark.parametrize(("kind", "config", "targets", "fits"), CONFIGS)
def test_size_equals_the_counts_of_transformers_and_peft(
    kind: str, config: dict[str, Any], targets: tuple[str, ...], fits: bool, tmp_path: Path
) -> None:
    from portllm.lm.learning.loading import add_lora

    model = on_meta(kind, config)
    model.config.save_pretrained(tmp_path)
    size = models.describe(str(tmp_path), FetchParams()).size
    assert size is not None
    assert size.parameters == model.num_parameters()
    assert (size.widths is not None) == fits
    patched = add_lora(model, LoraParams(r=4, target_modules=targets), seed=0)
    assert size.lora_parameters(4, targets) == patched.num_parameters(only_trainable=True)
    assert size.unmatched_targets((*targets, "abacus")) == ("abacus",)


def test_published_configs_have_the_published_counts() -> None:
    sizes = {name: models.published(name).size for name in models.PUBLISHED}
    counts = {name: size.parameters for name, size in sizes.items() if size is not None}
    assert counts["mistralai/Mistral-7B-v0.1"] == 7_241_732_096
    assert counts["meta-llama/Llama-2-7b-hf"] == 6_738_415_616
    assert counts["meta-llama/Llama-3.1-8B"] == 8_030_261_248
    assert counts["google/gemma-2-9b"] == 9_241_705_984
    assert counts.keys() == models.PUBLISHED.keys()
    assert all(size is not None and size.widths is not None for size in sizes.values())
    # 20.97 million trainable parameters of the PortLLM paper
    mistral = sizes["mistralai/Mistral-7B-v0.1"]
    assert mistral is not None
    assert mistral.lora_parameters(8, ALL_LINEARS) == 20_971_520


@pytest.mark.parametrize(("kind", "config"), [("llama", SMALL), ("gpt2", GPT2), ("mixtral", SMALL)])
def test_stored_bytes_of_a_checkpoint_are_exact(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from portllm.checkpoint.files.headers import read_header

    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).save_pretrained(tmp_path)
    model = models.describe(str(tmp_path), FetchParams())
    file = tmp_path / "model.safetensors"
    assert model.stored_bytes == file.stat().st_size
    assert model.size is not None
    assert model.size.stored_bytes == sum(t.nbytes for t in read_header(file).tensors.values())
    assert model.network_bytes == 0


def test_the_worlds_own_model_is_counted_as_it_is_pretrained() -> None:
    from portllm.lm.learning.llama import new_llama
    from portllm.world import tokenizer

    fetch = FetchParams()
    size = models.describe("world", fetch).size
    assert size is not None
    assert size.parameters == new_llama(tokenizer.build(), fetch.architecture, 0).num_parameters()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "abacus"}, "a model_type that transformers contains"),
        ({"model_type": "llama", **SMALL, "num_attention_heads": 0}, "transformers builds a"),
        ({"model_type": "llama", **SMALL, "hidden_size": "many"}, "transformers builds a llama config from"),
        ({"model_type": "llama", **SMALL, "num_hidden_layers": 10**9}, "num_hidden_layers of at most"),
        ({"model_type": "mine", "auto_map": {"AutoModel": "code.Mine"}}, "portllm runs no code"),
    ],
)
def test_a_config_that_transformers_cannot_build_has_no_size_but_a_reason(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = models.describe(str(tmp_path), FetchParams())
    assert model.size is None
    assert reason in model.reason
