"""New tokens, trained as PEFT's documentation has it: the base resized, its new rows trained or not, copies saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import portllm
from portllm.errors import UnsupportedPatchError

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of resized embeddings
OLD, NEW = 11, 14
TRAINED = [2, 11, 12, 13]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model(seed: int, *, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=OLD, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def made(folder: Path, *, tied: bool, tokens: list[int] | None) -> None:
    from peft import LoraConfig, get_peft_model

    old = model(0, tied=tied)
    old.save_pretrained(folder / "old")
    model(1, tied=tied).save_pretrained(folder / "new")
    old = type(old).from_pretrained(folder / "old")
    old.resize_token_embeddings(NEW, mean_resizing=False)
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, task_type="CAUSAL_LM")
    patched = get_peft_model(old, lora)
    for name, parameter in patched.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            torch.nn.init.normal_(parameter.data)
    patched.save_pretrained(folder / "patch")


def saved_copy(patch: Path, module: str) -> torch.Tensor:
    """The resized base weight that PEFT saved along."""
    tensors = load_file(patch / "adapter_model.safetensors")
    return next(v for k, v in tensors.items() if module in k and k.endswith(".weight") and v.shape == (NEW, 8))


def oracle(folder: Path, *, tied: bool) -> torch.Tensor:
    """PEFT's forward on the new base, resized, its new rows those of the old one; without the old base's other rows."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    grown = AutoModelForCausalLM.from_pretrained(folder / "new")
    grown.resize_token_embeddings(NEW, mean_resizing=False)
    with torch.no_grad():
        grown.get_input_embeddings().weight[OLD:] = saved_copy(folder / "patch", "embed_tokens")[OLD:]
        if not tied:
            grown.get_output_embeddings().weight[OLD:] = saved_copy(folder / "patch", "lm_head")[OLD:]
    bare = folder / "bare"
    bare.mkdir()
    tensors = load_file(folder / "patch" / "adapter_model.safetensors")
    kept = {k: v for k, v in tensors.items() if "lora_" in k or "trainable_tokens_delta" in k}
    save_file(kept, bare / "adapter_model.safetensors")
    (bare / "adapter_config.json").write_text((folder / "patch" / "adapter_config.json").read_text())
    return logits(PeftModel.from_pretrained(grown, bare))


def logits(of: Any) -> torch.Tensor:
    with torch.no_grad():
        return of.eval()(torch.arange(NEW)[None]).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tokens", [TRAINED, None], ids=["trained", "as they began"])
def test_the_new_rows_come_along_and_the_old_bases_stay(tied: bool, tokens: list[int] | None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made(tmp_path, tied=tied, tokens=tokens)
    new, out = tmp_path / "new", tmp_path / "out"
    portllm.port(tmp_path / "patch", onto=new, out=out, from_=tmp_path / "old")

    ported = AutoModelForCausalLM.from_pretrained(out)
    assert_close(logits(ported), oracle(tmp_path, tied=tied), rtol=1e-4, atol=1e-4)
    embedding = ported.get_input_embeddings().weight
    kept = [i for i in range(OLD) if not (tokens and i in tokens)]
    assert torch.equal(embedding[kept], load_file(new / "model.safetensors")[EMBEDDING][kept])
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (NEW, tied)
    assert (HEAD in load_file(out / "model.safetensors")) == (not tied)
    proven = portllm.verify(out, onto=new, patch=tmp_path / "patch", from_=tmp_path / "old", all=True)
    assert proven.proof is not None


def test_a_copy_of_another_base_is_refused(tmp_path: Path) -> None:
    made(tmp_path, tied=True, tokens=TRAINED)
    with pytest.raises(UnsupportedPatchError, match="expected a copy of the old base's"):
        portllm.port(tmp_path / "patch", onto=tmp_path / "new", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_cannot_carry_the_new_rows(tmp_path: Path) -> None:
    made(tmp_path, tied=True, tokens=TRAINED)
    with pytest.raises(UnsupportedPatchError, match="expected --as merged"):
        portllm.port(
            tmp_path / "patch", onto=tmp_path / "new", out=tmp_path / "out", from_=tmp_path / "old", as_="adapter"
        )
