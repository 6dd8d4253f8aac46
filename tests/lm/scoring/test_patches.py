"""What is scored next to the model: names that tell patches apart, and refusals before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from portllm.errors import EvaluationError, PatchError, ShapeError, UnmatchedModulesError
from portllm.lm.scoring import patches

Maker = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"
BASE = "base's fingerprint"


def find(*paths: Path, before: tuple[Path, ...] = (), notes: list[str] | None = None) -> tuple[Any, ...]:
    on_note = notes.append if notes is not None else lambda _: None
    return patches.find_patches(paths, before, base=BASE, on_note=on_note)


def ones(rank: int = 2, outputs: int = 4, inputs: int = 4) -> tuple[Any, Any]:
    return torch.ones(rank, inputs), torch.ones(outputs, rank)


@pytest.fixture
def model(tmp_path: Path, make_checkpoint: Maker) -> Path:
    tensors = {"model.embed_tokens.weight": torch.ones(11, 4), f"{Q}.weight": torch.ones(4, 4)}
    return make_checkpoint(tmp_path / "model", {**tensors, "lm_head.weight": torch.ones(11, 4)})


# --- names ---


def test_patches_of_one_name_are_told_apart(tmp_path: Path, make_patch: Maker) -> None:
    """issue 8, item 4."""
    paths = [make_patch(tmp_path / folder / "same", {Q: ones()}) for folder in ("x/A", "x/B", "y/B")]
    other = make_patch(tmp_path / "other", {Q: ones()})
    assert [one.name for one in find(*paths, other)] == ["A/same", "x/B/same", "y/B/same", "other"]


def test_a_longer_name_is_no_other_patch_s(tmp_path: Path, make_patch: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """issue 8, item 4: a relative path is its own name."""
    for folder in ("x/A/same", "B/same", "A/same"):
        make_patch(tmp_path / folder, {Q: ones()})
    monkeypatch.chdir(tmp_path)
    found = find(tmp_path / "x/A/same", tmp_path / "B/same", Path("A/same"))
    assert [one.name for one in found] == ["x/A/same", "B/same", "A/same"]


def test_two_revisions_of_one_repository_are_told_apart(tmp_path: Path, make_patch: Maker) -> None:
    """issue 8, item 4."""
    snapshots = tmp_path / "models--owner--name" / "snapshots"
    paths = [make_patch(snapshots / revision, {Q: ones()}) for revision in ("aaa", "bbb")]
    assert [one.name for one in find(*paths)] == ["owner/name@aaa", "owner/name@bbb"]


def test_a_patch_given_twice_is_scored_once_and_noted(
    tmp_path: Path, make_patch: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """issue 8, item 4."""
    patch = make_patch(tmp_path / "patches" / "p", {Q: ones()})
    monkeypatch.chdir(tmp_path)
    notes: list[str] = []
    (one,) = find(patch, tmp_path / "patches", Path("patches/p"), notes=notes)
    assert one.path == patch
    assert len(notes) == 2
    assert all(note.endswith("is given twice, scored once") for note in notes)
    assert [one.arm for one in find(patch, before=(patch,))] == ["patched"], "not again as an earlier release's"


def test_a_directory_that_is_no_patch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="found neither"):
        find(tmp_path)


# --- refusals ---


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_that_is_not_finite_is_refused(
    tmp_path: Path, make_patch: Maker, model: Path, value: float, dtype: torch.dtype
) -> None:
    """issue 8, item 1."""
    a, b = (factor.to(dtype) for factor in ones())
    b[3, 1] = value
    patch = make_patch(tmp_path / "p", {Q: (a, b)})
    with pytest.raises(PatchError, match=r"lora_B.weight holds NaN or infinity"):
        patches.check([model, patch], find(patch), model=model)


def test_a_model_that_is_not_finite_is_refused(tmp_path: Path, make_checkpoint: Maker, model: Path) -> None:
    """issue 8, item 1: a ported checkpoint, too."""
    bad = make_checkpoint(tmp_path / "bad", {"a.weight": torch.tensor([1.0, torch.nan]), "b": torch.tensor([1])})
    with pytest.raises(EvaluationError, match=r"model.safetensors: tensor a.weight holds NaN .*make or fetch"):
        patches.check([model, bad], [], model=model)
    patches.check([model], [], model=model)


def test_a_patch_of_another_shape_is_refused_with_tensor_and_both_shapes(
    tmp_path: Path, make_patch: Maker, model: Path
) -> None:
    """issue 8, item 15: from headers, before anything is loaded."""
    wide = make_patch(tmp_path / "wide", {Q: ones(inputs=8)})
    with pytest.raises(ShapeError, match=rf"wide: does not fit .*model: {Q}: patch is 4×8, base tensor .* is 4×4"):
        patches.check([], find(wide), model=model)


def test_a_patch_for_other_modules_is_refused(tmp_path: Path, make_patch: Maker, model: Path) -> None:
    """issue 8, item 15."""
    other = make_patch(tmp_path / "other", {Q.replace("0", "7"): ones()})
    with pytest.raises(UnmatchedModulesError, match=r"other: does not fit .*layers\.7\.self_attn\.q_proj"):
        patches.check([], find(other), model=model)


def test_a_patch_that_is_not_ported_may_still_be_scored(tmp_path: Path, make_patch: Maker, model: Path) -> None:
    """issue 8, item 15: PEFT has kinds of patches that a port refuses by name."""
    patch = make_patch(tmp_path / "p", {Q: ones()}, peft_type="IA3")
    patches.check([patch], find(patch), model=model)


@pytest.mark.parametrize(("a", "b", "idle"), [(1.0, 0.0, True), (0.0, 1.0, True), (1.0, 1.0, False)])
def test_a_patch_that_does_nothing_is_noted(tmp_path: Path, make_patch: Maker, a: float, b: float, idle: bool) -> None:
    """issue 8, item 1: every B zero, as after training at a learning rate of 0."""
    one, two = ones()
    patch = make_patch(tmp_path / "p", {Q: (one * a, two * b)})
    notes: list[str] = []
    patches.note_idle(find(patch), base=BASE, on_note=notes.append)
    assert notes == (["p: changes nothing of the model; its scores are the bare model's"] if idle else [])


def test_a_merged_model_that_is_the_base_is_noted(model: Path) -> None:
    """issue 8, item 1."""
    (one,) = find(model)
    notes: list[str] = []
    patches.note_idle([one], base=one.fingerprint, on_note=notes.append)
    assert len(notes) == 1


def test_a_patch_with_a_trained_bias_does_something(tmp_path: Path, make_patch: Maker) -> None:
    one, two = ones()
    bias = {f"base_model.model.{Q}.base_layer.bias": torch.ones(4)}
    patch = make_patch(tmp_path / "p", {Q: (one, two * 0)}, extra=bias, bias="lora_only")
    assert not patches.changes_nothing(patch)
    assert json.loads((patch / "adapter_config.json").read_text())["bias"] == "lora_only"
    assert os.listdir(patch)
