"""Drift and residual of checkpoints that are not the embedded world's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from portllm.params import EvolveParams, Params, ReleaseParams
from portllm.reporting.findings import weights
from portllm.reporting.findings.weights import Residual, Unmeasured

PARAMS = Params(tasks=("t",), releases=("v0", "v1"), evolve=EvolveParams(releases={"v1": ReleaseParams(base="v0")}))


def release(models: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    folder = models / "releases" / name
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def patch(models: Path, name: str, *, rank: int, module: str = "model.layers.0.q_proj", **config: object) -> None:
    folder = models / "patches" / name / "t"
    folder.mkdir(parents=True)
    factors = {"lora_A": torch.randn(rank, 4), "lora_B": torch.randn(6, rank)}
    tensors = {f"base_model.model.{module}.{side}.weight": x for side, x in factors.items()}
    if config.get("use_dora"):
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = torch.ones(6)
    save_file(tensors, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "k_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**known, **config}))


def test_experts_of_a_layer_are_one_module_and_doubtful_kinds_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(3)]
    names += ["model.layers.0.mlp.shared_expert.up_proj.weight", "model.layers.1.q_proj.weight", "lm_head.weight"]
    old = {name: torch.randn(4, 4) for name in names}
    new = {name: w + torch.randn(4, 4) for name, w in old.items()}
    release(tmp_path, "v0", old)
    release(tmp_path, "v1", new)
    (drift,) = weights.drifts(PARAMS, tmp_path)
    ratios = {(m.layer, m.kind): m.drift_ratio for m in drift.modules}
    experts = names[:3]
    moved = sum(float((new[n] - old[n]).square().sum()) for n in experts) ** 0.5
    size = sum(float(old[n].square().sum()) for n in experts) ** 0.5
    assert ratios[0, "model.layers.mlp.experts.*.up_proj"] == pytest.approx(moved / size, rel=1e-5)
    assert {kind for _, kind in ratios} == {
        "model.layers.mlp.experts.*.up_proj", "model.layers.mlp.shared_expert.up_proj", "q_proj", "lm_head",
    }  # fmt: skip
    assert (drift.release, drift.against, drift.not_compared) == ("v1", "v0", ())


def test_what_cannot_be_compared_is_listed_not_guessed(tmp_path: Path) -> None:
    same = {"a.weight": torch.ones(2, 2), "steps": torch.ones(2, dtype=torch.int64)}
    release(tmp_path, "v0", {**same, "embed.weight": torch.ones(3, 2), "gone.weight": torch.ones(1)})
    release(tmp_path, "v1", {**same, "embed.weight": torch.ones(5, 2)})
    (drift,) = weights.drifts(PARAMS, tmp_path)
    assert drift.not_compared == ("embed.weight", "gone.weight")
    assert [m.module for m in drift.modules] == ["a"]
    assert drift.overall == 0.0


def test_a_tensor_of_zeros_has_no_relative_drift(tmp_path: Path) -> None:
    release(tmp_path, "v0", {"a.weight": torch.zeros(2, 2)})
    release(tmp_path, "v1", {"a.weight": torch.ones(2, 2)})
    (drift,) = weights.drifts(PARAMS, tmp_path)
    assert (drift.overall, drift.modules[0].drift_ratio) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_of_other_rank_or_other_modules_still_have_a_residual(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = {f"model.layers.0.{kind}.weight": torch.randn(6, 4).to(dtype) for kind in ("q_proj", "k_proj")}
    release(tmp_path, "v0", base)
    release(tmp_path, "v1", base)
    patch(tmp_path, "v0", rank=2)
    patch(tmp_path, "v1", rank=3, module="model.layers.0.k_proj")
    (residual,) = weights.residuals(PARAMS, tmp_path)
    assert isinstance(residual, Residual)
    # the two patches touch different modules: nothing cancels
    assert residual.residual_norm**2 == pytest.approx(residual.patch_norm**2 + residual.retuned_norm**2)
    assert residual.cosine == 0.0


def test_the_same_patch_leaves_no_residual(tmp_path: Path) -> None:
    base = {"model.layers.0.q_proj.weight": torch.randn(6, 4)}
    release(tmp_path, "v0", base)
    release(tmp_path, "v1", base)
    for name in ("v0", "v1"):
        torch.manual_seed(0)
        patch(tmp_path, name, rank=2)
    (residual,) = weights.residuals(PARAMS, tmp_path)
    assert isinstance(residual, Residual)
    assert residual.over_patch == pytest.approx(0.0, abs=1e-6)
    assert residual.cosine == pytest.approx(1.0)


@pytest.mark.parametrize("what", [{"use_dora": True}, {"module": "model.layers.9.q_proj"}])
def test_what_is_not_plain_lora_on_the_base_is_said(tmp_path: Path, what: Mapping[str, object]) -> None:
    base = {"model.layers.0.q_proj.weight": torch.randn(6, 4)}
    release(tmp_path, "v0", base)
    release(tmp_path, "v1", base)
    patch(tmp_path, "v0", rank=2, **what)  # type: ignore[arg-type]
    patch(tmp_path, "v1", rank=2)
    (residual,) = weights.residuals(PARAMS, tmp_path)
    assert isinstance(residual, Unmeasured)
    assert (
        "has DoRA, expected plain LoRA" in residual.reason or "has no model.layers.9.q_proj.weight" in residual.reason
    )
