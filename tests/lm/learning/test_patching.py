"""A patch as it is saved: what was trained and nothing of the base, whichever modules are adapted."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from portllm.lm.learning import llama, patching
from portllm.params import ArchitectureParams, LoraParams, OptimParams, PortParams, TrainParams
from portllm.verbs import port
from portllm.world import tokenizer

SHAPE = ArchitectureParams(hidden_size=16, intermediate_size=32, layers=1, heads=2)
LORA = LoraParams(r=2, alpha=4, dropout=0.0, target_modules=("embed_tokens", "q_proj", "lm_head"))
PARAMS = TrainParams(max_length=32, lora=LORA, optim=OptimParams(learning_rate=1e-2, max_steps=3, threads=1))
PAIRS = [("the film was", " good"), ("the meal was", " bad")] * 4


def write_base(folder: Path, seed: int) -> Path:
    words = tokenizer.build()
    llama.new_llama(words, SHAPE, seed=seed).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_an_adapted_embedding_and_head_are_ported_and_nothing_of_their_base_is(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    old, new = write_base(tmp_path / "v0", 0), write_base(tmp_path / "v1", 1)
    (tmp_path / "patch").mkdir()
    patching.train(old, PAIRS, PARAMS).save(tmp_path / "patch", base_name="v0")
    names = load_file(tmp_path / "patch" / "adapter_model.safetensors")
    assert names, "a patch has weights"
    assert all(".lora_" in name for name in names)
    assert sum("embed_tokens" in name for name in names) == sum("lm_head" in name for name in names) == 2

    port.run(patch=tmp_path / "patch", onto=new, source=old, out=tmp_path / "ported", params=PortParams())
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "ported")(tokens).logits
        bare = AutoModelForCausalLM.from_pretrained(new)
        before = bare(tokens).logits
        adapted = PeftModel.from_pretrained(bare, tmp_path / "patch")(tokens).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 1e-3
