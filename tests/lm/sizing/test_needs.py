"""Estimates of memory against what autograd keeps; time and disk grow as the experiment does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from portllm import params
from portllm.lm.sizing import needs, shapes
from portllm.lm.sizing.needs import Pace
from portllm.lm.sizing.shapes import PUBLISHED
from portllm.params import ALL_LINEARS, LoraParams, OptimParams

ROOT = Path(__file__).parents[3]
MISTRAL = PUBLISHED["mistralai/Mistral-7B-v0.1"]
H100 = Pace(flops_per_second=989e12, utilisation=0.35, memory_bytes_per_second=3.35e12, element_bytes=2)


def kept_bytes(model: Any, batch: torch.Tensor) -> int:
    """Bytes of the distinct tensors that a forward keeps for its backward, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(input_ids=batch, use_cache=False)  # held until counted, so that no address is used twice
        total = sum(seen.values())
    del out
    return total


def test_activations_are_what_autograd_keeps(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from portllm.lm.learning.loading import add_lora

    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shape = shapes.from_config(json.loads((tmp_path / "config.json").read_text()), "tiny")
    assert shape is not None
    batch = torch.randint(0, 64, (4, 96))
    torch.manual_seed(0)
    model = add_lora(LlamaForCausalLM(config), LoraParams(target_modules=ALL_LINEARS, dropout=0.1), seed=0).train()
    estimated = needs.activation_bytes(shape, batch.numel(), 4, OptimParams())
    assert estimated == pytest.approx(kept_bytes(model, batch), rel=0.25)


def test_checkpointing_and_four_bits_save_memory_and_logits_cost_it() -> None:
    saved = OptimParams(gradient_checkpointing=True)
    lora = MISTRAL.lora_parameters(8, ALL_LINEARS)
    plain = needs.training_bytes(MISTRAL, lora, 1024, H100, OptimParams(), four_bit=False)
    light = needs.training_bytes(MISTRAL, lora, 1024, H100, saved, four_bit=False)
    lightest = needs.training_bytes(MISTRAL, lora, 1024, H100, saved, four_bit=True)
    assert 2 * MISTRAL.parameters < light < plain
    assert lightest < light - 1.3 * MISTRAL.parameters
    wide = replace(MISTRAL, vocabulary=256_000)
    assert needs.training_bytes(wide, lora, 1024, H100, saved, four_bit=False) > light + 10 * 1024 * 220_000


def test_a_profiles_needs_follow_from_its_counts() -> None:
    profile = params.load(ROOT / "profiles" / "mistral-7b.yaml")
    stages = {n.stage: n for n in needs.estimate(profile, dict.fromkeys(profile.releases, MISTRAL), H100)}
    assert stages["fetch"].disk_bytes == 2 * 7_241_732_096
    assert stages["evolve"].disk_bytes == 4 * stages["fetch"].disk_bytes
    assert stages["train"].runs == 35
    assert stages["train"].disk_bytes == stages["port"].disk_bytes == 35 * 4 * 20_971_520
    merged = replace(profile, port=params.PortParams(as_="merged"))
    ported = {n.stage: n for n in needs.estimate(merged, dict.fromkeys(profile.releases, MISTRAL), H100)}["port"]
    assert ported.disk_bytes == 35 * stages["fetch"].disk_bytes
    longer = replace(profile, train=replace(profile.train, optim=replace(profile.train.optim, epochs=20)))
    doubled = {n.stage: n for n in needs.estimate(longer, dict.fromkeys(profile.releases, MISTRAL), H100)}["train"]
    assert 1.9 < doubled.seconds / stages["train"].seconds < 2
    # a task that is in no table is named, not guessed
    other = replace(profile, tasks=("piqa",))
    assert needs.estimate(other, dict.fromkeys(profile.releases, MISTRAL), H100)[3].unknown == ("rows of piqa",)
