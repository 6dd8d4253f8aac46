"""Patches that touch tied weights, ported to a base that ties them or not: PEFT's own logits, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import portllm
from portllm.errors import UnmatchedModulesError, UnsupportedPatchError

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied weights

BOTH = {"save_embedding_layers": True}
TIES = {"ensure_weight_tying": True, "target_modules": ["embed_tokens", "q_proj"]}
CASES: dict[str, tuple[bool, dict[str, Any]]] = {  # whether the new base ties, config
    "one update for both": (True, TIES),
    "a scaling for each": (True, {**TIES, "alpha_pattern": {"lm_head": 9}}),
    "a norm for each": (True, {**TIES, "use_dora": True}),
    "saved whole": (True, {"ensure_weight_tying": True, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved whole, with copies": (
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "save": BOTH},
    ),
    "rows": (
        True,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 4], "lm_head": [1, 4]}},
    ),
    "rows onto an untied base": (False, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 4]}),
}
REFUSED: dict[str, dict[str, Any]] = {
    "an update": TIES,
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 4], "lm_head": [1, 4]}},
}


def model(tied: bool, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def trained(folder: Path, *, tied: bool, save: Any = None, **config: Any) -> None:
    from peft import LoraConfig, get_peft_model

    old = model(True, seed=0)
    old.save_pretrained(folder / "old")
    patched = get_peft_model(old, LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **config}))
    for name, parameter in patched.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            torch.nn.init.normal_(parameter.data)
    patched.save_pretrained(folder / "patch", **(save or {}))
    model(tied, seed=1).save_pretrained(folder / "new")


def logits(base: Path, patch: Path | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded = loaded if patch is None else PeftModel.from_pretrained(loaded, patch)
    with torch.no_grad():
        return loaded.eval()(torch.arange(11)[None]).logits


def without_copies(patch: Path) -> None:
    """Take out what is of the old base, which PEFT would put over the new one."""
    from safetensors.torch import load_file, save_file

    path = patch / "adapter_model.safetensors"
    own = ("lora_", "trainable_tokens_delta", "embed_tokens.weight")
    tied = "lm_head.weight" if 'ensure_weight_tying": true' in (patch / "adapter_config.json").read_text() else "lora_"
    save_file({k: v for k, v in load_file(path).items() if any(part in k for part in (*own, tied))}, path)


@pytest.mark.parametrize("name", CASES)
def test_tied_weights_are_ported_as_peft_has_them(name: str, tmp_path: Path) -> None:
    tied, config = CASES[name]
    trained(tmp_path, tied=tied, **config)
    for output in ("merged", "adapter"):
        portllm.port(
            tmp_path / "patch", onto=tmp_path / "new", out=tmp_path / output, from_=tmp_path / "old", as_=output
        )
    without_copies(tmp_path / "patch")
    expected = logits(tmp_path / "new", tmp_path / "patch")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logits(tmp_path / "new", tmp_path / "adapter"), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_lives_by_a_tie_needs_a_base_that_ties(name: str, tmp_path: Path) -> None:
    trained(tmp_path, tied=False, **REFUSED[name])
    with pytest.raises(UnmatchedModulesError, match=r"lm_head: .* does not tie them"):
        portllm.port(tmp_path / "patch", onto=tmp_path / "new", out=tmp_path / "out", from_=tmp_path / "old")


@pytest.mark.parametrize(
    ("config", "side"),
    [(TIES, "lm_head.lora_A.weight"), (CASES["saved whole"][1], "lm_head.weight")],
    ids=["an update", "saved whole"],
)
def test_two_sides_of_one_weight_have_to_be_equal(config: dict[str, Any], side: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained(tmp_path, tied=True, **config)
    path = tmp_path / "patch" / "adapter_model.safetensors"
    tensors = load_file(path)
    assert f"base_model.model.{side}" in tensors
    tensors[f"base_model.model.{side}"] += 1  # PEFT would keep whichever of the two it reads last
    save_file(tensors, path)
    with pytest.raises(UnsupportedPatchError, match="expected equal values of both"):
        portllm.port(tmp_path / "patch", onto=tmp_path / "new", from_=tmp_path / "old", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
