"""Adapters of experts as transformers 4 had them, one pair of factors for each expert: they name the tensors on disk.

Such an adapter was trained on a model whose experts were modules, so what it means is W + s·BA of every tensor on disk;
PEFT, which turns it into one of stacked experts, supports some of these architectures only.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from portllm.params import PortParams
from portllm.verbs import port
from tests.matrix import judge
from tests.matrix.judge import NEW, PREFIX, Bench

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of their own affairs

GATED = ("gate_proj", "up_proj", "down_proj")
TARGETS = {"mixtral": ("q_proj", "w1", "w2", "w3"), "qwen3_moe": ("q_proj", *GATED), "olmoe": GATED, "qwen2_moe": GATED}


def adapter(tensors: dict[str, torch.Tensor], targets: tuple[str, ...], folder: Path) -> dict[str, torch.Tensor]:
    """Write random factors for every tensor of `targets`; returns the tensors with the update added, in float64."""
    from peft import LoraConfig

    generator = torch.Generator().manual_seed(5)
    factors, tuned = {}, {}
    for name, weight in sorted(tensors.items()):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            a = 0.2 * torch.randn(4, weight.shape[1], generator=generator)
            b = 0.2 * torch.randn(weight.shape[0], 4, generator=generator)
            factors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
            tuned[name] = weight.double() + 2 * b.double() @ a.double()
    LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM").save_pretrained(folder)
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return tuned


@pytest.mark.parametrize("architecture", TARGETS)
def test_every_expert_gets_its_own_pair(architecture: str, bench: Bench, tmp_path: Path) -> None:
    new, out = bench.base(architecture, NEW), tmp_path / "out"
    before = {name: tensor for shard in judge.shards(new).values() for name, tensor in shard.items()}
    tuned = adapter(before, TARGETS[architecture], tmp_path / "patch")
    assert sum("experts." in name for name in tuned) == 2 * 4 * 3
    record = port.run(patch=tmp_path / "patch", onto=new, out=out, params=PortParams())
    after = {name: tensor for shard in judge.shards(out).values() for name, tensor in shard.items()}
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, tuned[name].float() if name in tuned else before[name]), name
    assert record.tensors["changed"] == len(tuned)
