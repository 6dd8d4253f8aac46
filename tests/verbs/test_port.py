"""A port is right, or refused with nothing left behind.

Right means: the ported checkpoint's logits are those of PEFT's unmerged adapter on the new base, through transformers,
on tiny random models; the new base is never the one the patch was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from portllm.algebra import lora
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.record.records import PortRecord
from portllm.errors import PatchError
from portllm.params import PortParams
from portllm.verbs import port

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of their own affairs

SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "tie_word_embeddings": False}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "gemma2": {**LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": True},
    "phi3": {**LLAMA_LIKE, "pad_token_id": 0},
    "gpt_neox": {**SMALL, "intermediate_size": 24, "tie_word_embeddings": False},
    "gpt2": {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
}
LINEARS: dict[str, list[str]] = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = torch.arange(24).view(2, 12)


def new_model(kind: str, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind], initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def train(
    kind: str, folder: Path, *, targets: list[str] | None = None, save: dict[str, Any] | None = None, **more: Any
) -> Path:
    """A patch as PEFT saves it, with random factors in place of training, made on a base of seed 0."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=targets or LINEARS.get(kind, ALL), **{"r": 4, "lora_alpha": 8, **more})
    model = get_peft_model(new_model(kind, 0), config)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.2)
    model.save_pretrained(folder, **(save or {}))
    return folder


def logits(folder: Path, patch: Path | None = None) -> torch.Tensor:
    """What transformers, in float32, and PEFT without merging make of the prompt."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if patch is not None:
        model = PeftModel.from_pretrained(model, str(patch))
    with torch.no_grad():
        return model.eval()(PROMPT).logits


def merged(patch: Path, onto: Path, out: Path, **more: Any) -> PortRecord:
    return port.run(patch=patch, onto=onto, out=out, params=PortParams(), **more)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_are_those_of_the_unmerged_adapter(kind: str, tmp_path: Path) -> None:
    patch = train(kind, tmp_path / "patch")
    new_model(kind, 1).save_pretrained(tmp_path / "new")
    record = merged(patch, tmp_path / "new", tmp_path / "out")
    expected, base = logits(tmp_path / "new", patch), logits(tmp_path / "new")
    assert (expected - base).abs().max() > 0.1  # or the test could not fail
    assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    factors = load_file(patch / "adapter_model.safetensors")
    assert record.modules["matched"] == record.tensors["changed"] == len(factors) / 2


def test_gpt2_as_the_hub_has_it(tmp_path: Path) -> None:
    """Published without its head: names on disk lack the prefix of memory, and square weights are stored (in, out)."""
    patch = train("gpt2", tmp_path / "patch")
    new_model("gpt2", 1).transformer.save_pretrained(tmp_path / "new")
    assert "h.0.attn.c_proj.weight" in load_file(tmp_path / "new" / "model.safetensors")
    assert json.loads((patch / "adapter_config.json").read_text())["fan_in_fan_out"]
    edited = {**json.loads((patch / "adapter_config.json").read_text()), "fan_in_fan_out": False}
    (patch / "adapter_config.json").write_text(json.dumps(edited))  # the layout is the base's, whatever the flag says
    merged(patch, tmp_path / "new", tmp_path / "out")
    assert_close(logits(tmp_path / "out"), logits(tmp_path / "new", patch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"^model.layers.0.*proj": 3}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"self_attn.v_proj": 1}},
        {"layers_to_transform": [1], "fan_in_fan_out": True},
        {"exclude_modules": ["o_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=lambda config: "+".join(config),
)
def test_every_plain_lora_configuration(config: dict[str, Any], tmp_path: Path) -> None:
    patch = train("llama", tmp_path / "patch", **config)
    new_model("llama", 1).save_pretrained(tmp_path / "new")
    merged(patch, tmp_path / "new", tmp_path / "out")
    assert_close(logits(tmp_path / "out"), logits(tmp_path / "new", patch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_bases_sharded(dtype: torch.dtype, tmp_path: Path) -> None:
    patch, new, out = train("llama", tmp_path / "patch"), tmp_path / "new", tmp_path / "out"
    new_model("llama", 1, dtype).save_pretrained(new, max_shard_size="3KB")
    merged(patch, new, out)
    shards = sorted(p.name for p in new.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(p.name for p in out.glob("*.safetensors")) == shards
    factors = load_file(patch / "adapter_model.safetensors")
    for shard in shards:
        before, after = load_file(new / shard), load_file(out / shard)
        for name, weight in before.items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in factors:
                a, b = factors[f"{key}.lora_A.weight"].double(), factors[f"{key}.lora_B.weight"].double()
                assert torch.equal(after[name], lora.round_once(weight.double() + 2 * b @ a, dtype))
            else:
                assert torch.equal(after[name], weight)
    expected, base = logits(new, patch), logits(new)
    # what is left is the rounding of the weights, small beside what the patch does
    assert (logits(out) - expected).abs().max() < 0.02 * (expected - base).abs().max()


def test_lora_on_an_untied_head_with_the_old_base_at_hand(tmp_path: Path) -> None:
    patch = train("llama", tmp_path / "patch", targets=["q_proj", "lm_head"])
    new_model("llama", 0).save_pretrained(tmp_path / "old")
    new_model("llama", 1).save_pretrained(tmp_path / "new")
    assert any("base_layer" in name for name in load_file(patch / "adapter_model.safetensors"))
    with pytest.raises(PatchError, match="pass that base as --from"):
        merged(patch, tmp_path / "new", tmp_path / "out")
    merged(patch, tmp_path / "new", tmp_path / "out", source=tmp_path / "old")
    bare = train("llama", tmp_path / "bare", targets=["q_proj", "lm_head"], save={"save_embedding_layers": False})
    expected = logits(tmp_path / "new", bare)  # PEFT would put the saved old head over the new one
    assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    again = port.run(
        patch=patch,
        onto=tmp_path / "new",
        out=tmp_path / "adapter",
        params=PortParams(as_="adapter"),
        source=tmp_path / "old",
    )
    assert_close(logits(tmp_path / "new", tmp_path / "adapter"), expected, rtol=1e-4, atol=1e-4)
    assert again.fingerprint == fingerprint(tmp_path / "adapter")


@pytest.mark.parametrize("scale", [0.5, -1.0])
@pytest.mark.parametrize("rslora", [False, True])
def test_scale_and_both_outputs(scale: float, rslora: bool, tmp_path: Path) -> None:
    patch = train("llama", tmp_path / "patch", use_rslora=rslora, alpha_pattern={"q_proj": 3})
    new_model("llama", 1).save_pretrained(tmp_path / "new")
    for as_ in ("merged", "adapter"):
        params = PortParams(as_=as_, scale=scale)
        port.run(patch=patch, onto=tmp_path / "new", out=tmp_path / as_, params=params)
    expected = logits(tmp_path / "new", tmp_path / "adapter")
    assert_close(logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)
    weight = "model.layers.0.self_attn.q_proj"
    a, b = (load_file(patch / "adapter_model.safetensors")[f"base_model.model.{weight}.lora_{s}.weight"] for s in "AB")
    drift = load_file(tmp_path / "merged" / "model.safetensors")[f"{weight}.weight"]
    drift = drift - load_file(tmp_path / "new" / "model.safetensors")[f"{weight}.weight"]
    assert_close(drift, scale * (3 / 2 if rslora else 3 / 4) * b @ a, rtol=1e-4, atol=1e-6)
