"""Estimates of memory are compared with what autograd keeps; time and disk grow with the experiment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from portllm import params
from portllm.lm.sizing import models, needs, pace
from portllm.lm.sizing.needs import Device
from portllm.lm.sizing.pace import Pace
from portllm.params import ALL_LINEARS, FetchParams, LoraParams, OptimParams

ROOT = Path(__file__).parents[3]
H100 = Pace(flops_per_second=989e12, utilisation=0.35, memory_bytes_per_second=3.35e12)
DEVICE = Device(element_bytes=2, pace=H100)


@pytest.fixture(scope="module")
def mistral() -> models.ModelSize:
    size = models.published("mistralai/Mistral-7B-v0.1").size
    assert size is not None
    return size


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
    size = models.describe(str(tmp_path), FetchParams()).size
    assert size is not None
    assert size.widths is not None
    batch = torch.randint(0, 64, (4, 96))
    torch.manual_seed(0)
    model = add_lora(LlamaForCausalLM(config), LoraParams(target_modules=ALL_LINEARS, dropout=0.1), seed=0).train()
    estimated = needs.activation_bytes(size.widths, batch.numel(), 4, OptimParams())
    assert estimated == pytest.approx(kept_bytes(model, batch), rel=0.25)


def test_checkpointing_and_four_bits_reduce_memory_and_logits_add_to_it(mistral: models.ModelSize) -> None:
    saved = OptimParams(gradient_checkpointing=True)
    lora = mistral.lora_parameters(8, ALL_LINEARS)
    plain = needs.training_bytes(mistral, lora, 1024, 2, OptimParams(), four_bit=False)
    light = needs.training_bytes(mistral, lora, 1024, 2, saved, four_bit=False)
    lightest = needs.training_bytes(mistral, lora, 1024, 2, saved, four_bit=True)
    assert 2 * mistral.parameters < light < plain
    assert lightest < light - 1.3 * mistral.parameters
    wide = replace(mistral, vocabulary=256_000)
    assert needs.training_bytes(wide, lora, 1024, 2, saved, four_bit=False) > light + 10 * 1024 * 220_000


def stages(profile: params.Params, size: models.ModelSize, device: Device = DEVICE) -> dict[str, needs.Need]:
    return {need.stage: need for need in needs.estimate(profile, dict.fromkeys(profile.releases, size), device)}


def test_a_profiles_needs_follow_from_its_counts(mistral: models.ModelSize) -> None:
    profile = params.load(ROOT / "profiles" / "mistral-7b.yaml")
    needed = stages(profile, mistral)
    assert needed["fetch"].disk_bytes == 2 * 7_241_732_096
    assert needed["evolve"].disk_bytes == 4 * needed["fetch"].disk_bytes
    assert needed["train"].runs == 35
    assert needed["train"].disk_bytes == needed["port"].disk_bytes == 35 * 4 * 20_971_520
    merged = replace(profile, port=params.PortParams(as_="merged"))
    assert stages(merged, mistral)["port"].disk_bytes == 35 * needed["fetch"].disk_bytes
    longer = replace(profile, train=replace(profile.train, optim=replace(profile.train.optim, epochs=20)))
    doubled, once = stages(longer, mistral)["train"].seconds, needed["train"].seconds
    assert doubled is not None
    assert once is not None
    assert 1.9 < doubled / once < 2
    # a task that is in no table is named, not guessed
    assert stages(replace(profile, tasks=("piqa",)), mistral)["train"].unknown == ("rows of piqa",)


def test_estimate_without_a_measured_pace_has_bytes_but_no_seconds(mistral: models.ModelSize) -> None:
    profile = params.load(ROOT / "profiles" / "mistral-7b.yaml")
    timed, untimed = stages(profile, mistral), stages(profile, mistral, Device(element_bytes=2, pace=None))
    assert all(need.seconds is not None for need in timed.values())
    assert untimed == {stage: replace(need, seconds=None) for stage, need in timed.items()}


def test_estimate_for_widths_that_are_not_known_names_what_it_leaves_out(mistral: models.ModelSize) -> None:
    profile = params.load(ROOT / "profiles" / "mistral-7b.yaml")
    needed, known = stages(profile, replace(mistral, widths=None)), stages(profile, mistral)
    for stage in ("evolve", "train", "evaluate"):
        assert needed[stage].seconds is None
        assert any("time of" in text and "dense decoder" in text for text in needed[stage].unknown)
        assert needed[stage].disk_bytes == known[stage].disk_bytes
    assert 2 * mistral.parameters < needed["train"].memory_bytes < known["train"].memory_bytes
    assert (needed["fetch"], needed["port"]) == (known["fetch"], known["port"])


def test_the_pace_of_this_processor_is_measured_on_its_cores() -> None:
    threads = torch.get_num_threads()
    speed = pace.cpu_pace()
    assert torch.get_num_threads() == threads
    assert 1e8 < speed.flops_per_second < 1e15
    assert 1e8 < speed.memory_bytes_per_second < 1e13
    few, many = (speed.step_seconds(flops, 2, 3) for flops in (0.0, 1e15))
    assert few == pytest.approx(pace.STEP_SECONDS + 2 * pace.LAYER_STEP_SECONDS)
    assert many == pytest.approx(1e15 / (speed.utilisation * speed.flops_per_second))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_pace_of_a_gpu_is_measured_in_its_dtype() -> None:
    fast, slow = pace.gpu_pace(2), pace.gpu_pace(4)
    assert fast is not None
    assert slow is not None
    assert fast.flops_per_second > slow.flops_per_second > 1e11


def test_no_gpu_has_no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pace.gpu_pace(2) is None


def test_a_gpu_that_refuses_work_has_no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pace, "_measure", refuse)
    assert pace.gpu_pace(2) is None
