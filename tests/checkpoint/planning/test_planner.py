"""The plan is whole before anything is written: every module has its tensor, every shape fits, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import Base
from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.base.layout import Layout
from portllm.checkpoint.planning.changes import Plan
from portllm.checkpoint.planning.planner import make_plan
from portllm.checkpoint.planning.refusals import check_saved
from portllm.errors import CheckpointError, ShapeError, UnmatchedModulesError, UnsupportedPatchError

LLAMA = {"model_type": "llama", "vocab_size": 11, "tie_word_embeddings": False}
TENSORS = {
    "model.embed_tokens.weight": torch.ones(11, 4),
    "model.layers.0.self_attn.q_proj.weight": torch.ones(6, 4),
    "model.layers.0.mlp.up_proj.weight": torch.ones(8, 4),
    "model.layers.0.input_layernorm.weight": torch.ones(4),
    "lm_head.weight": torch.ones(11, 4),
}
Q = "model.layers.0.self_attn.q_proj"


def lora(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(2, columns), torch.ones(rows, 2)


class World:
    """A folder in which patches and bases are made and planned together."""

    def __init__(self, folder: Path, make_checkpoint: Callable[..., Path], make_patch: Callable[..., Path]) -> None:
        self.folder, self.make_checkpoint, self.make_patch = folder, make_checkpoint, make_patch

    def base(
        self, config: dict[str, Any] = LLAMA, tensors: dict[str, torch.Tensor] = TENSORS, name: str = "base"
    ) -> Base:
        return Base.plain(Checkpoint.open(self.make_checkpoint(self.folder / name, tensors, config)))

    def patch(self, pairs: dict[str, Any], **config: Any) -> Patch:
        return Patch.open(self.make_patch(self.folder / "patch", pairs, **config))

    def plan(self, pairs: dict[str, Any], config: dict[str, Any] = LLAMA, **more: Any) -> Plan:
        return make_plan(self.patch(pairs, **more), self.base(config))


@pytest.fixture
def world(tmp_path: Path, make_checkpoint: Callable[..., Path], make_patch: Callable[..., Path]) -> World:
    return World(tmp_path, make_checkpoint, make_patch)


def test_every_module_gets_its_tensor(world: World) -> None:
    plan = world.plan({Q: lora(6, 4), "lm_head": lora(11, 4)})
    assert set(plan.changes) == {f"{Q}.weight", "lm_head.weight"}
    assert {c.origin for c in plan.changes.values()} == set(plan.changes)
    assert (plan.matched, plan.total) == (2, 3)


def test_embeddings_and_norms_are_no_linears(world: World) -> None:
    assert world.base().linears == {Q, "model.layers.0.mlp.up_proj", "lm_head"}


def test_modules_the_base_lacks_are_named(world: World) -> None:
    pairs = {f"model.layers.{i}.self_attn.q_proj": lora(6, 4) for i in range(6)}
    with pytest.raises(UnmatchedModulesError) as error:
        world.plan(pairs)
    assert "5 of the patch's 6 modules" in str(error.value)
    assert "model.layers.1.self_attn.q_proj" in str(error.value)
    assert "and 2 more" in str(error.value)


def test_tensors_of_no_parameter_of_the_model_are_not_found(world: World) -> None:
    """A config.json of another family: the names are on disk, but that model would never read them."""
    nothing = Layout(modules={}, blocks={}, tied={})
    with pytest.raises(UnmatchedModulesError, match="1 of the patch's 1 modules are not in"):
        make_plan(world.patch({Q: lora(6, 4)}), Base(world.base().checkpoint, nothing))


def test_shapes_that_differ_are_named_with_both(world: World) -> None:
    with pytest.raises(ShapeError, match=rf"{Q}: patch is 6×5, base tensor {Q}\.weight is 6×4; is this a release"):
        world.plan({Q: lora(6, 5)})


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA, "tie_word_embeddings": True},
        {"model_type": "gemma", "vocab_size": 11},
        {"vocab_size": 11},
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_an_update_of_a_tied_head_gives_it_a_tensor_of_its_own(
    config: dict[str, Any], on_disk: bool, world: World
) -> None:
    tensors = TENSORS if on_disk else {k: v for k, v in TENSORS.items() if k != "lm_head.weight"}
    plan = make_plan(world.patch({"lm_head": lora(11, 4)}), world.base(config, tensors))
    assert set(plan.changes) == {"lm_head.weight"}
    assert plan.changes["lm_head.weight"].origin == "model.embed_tokens.weight"
    assert plan.config == {"tie_word_embeddings": False}


def test_a_head_that_differs_from_its_embedding_on_disk_is_not_tied(world: World) -> None:
    base = world.base({**LLAMA, "tie_word_embeddings": True}, {**TENSORS, "lm_head.weight": torch.zeros(11, 4)})
    plan = make_plan(world.patch({"lm_head": lora(11, 4)}), base)
    assert plan.changes["lm_head.weight"].origin == "lm_head.weight"
    assert not plan.config


@pytest.mark.parametrize("config", [LLAMA, {"model_type": "llama", "vocab_size": 11}])
def test_untied_heads_are_changed(config: dict[str, Any], world: World) -> None:
    assert set(world.plan({"lm_head": lora(11, 4)}, config).changes) == {"lm_head.weight"}


@pytest.mark.parametrize("module", ["lm_head", "embed_out"])
def test_gpt_neox_calls_its_head_otherwise_on_disk(module: str, world: World) -> None:
    base = world.base({"model_type": "gpt_neox", "vocab_size": 11}, {"embed_out.weight": torch.ones(11, 4)})
    plan = make_plan(world.patch({module: lora(11, 4)}), base)
    assert set(plan.changes) == {"embed_out.weight"}
    assert (plan.matched, plan.total) == (1, 1)


def test_two_modules_of_one_tensor_are_refused(world: World) -> None:
    base = world.base({"model_type": "gpt_neox", "vocab_size": 11}, {"embed_out.weight": torch.ones(11, 4)})
    with pytest.raises(UnmatchedModulesError, match="are both embed_out"):
        make_plan(world.patch({"lm_head": lora(11, 4), "embed_out": lora(11, 4)}), base)


def test_conv1d_is_stored_transposed(world: World) -> None:
    config = {"model_type": "gpt2", "vocab_size": 11}
    tensors = {
        "transformer.h.0.attn.c_attn.weight": torch.ones(4, 12),
        "transformer.h.0.attn.c_proj.weight": torch.ones(4, 4),
    }
    pairs = {"transformer.h.0.attn.c_attn": lora(12, 4), "transformer.h.0.attn.c_proj": lora(4, 4)}
    plan = make_plan(world.patch(pairs, fan_in_fan_out=True), world.base(config, tensors))
    assert set(plan.changes) == set(tensors)  # shapes as (in, out) fit only transposed


def test_fan_in_fan_out_on_code_we_do_not_run_is_refused(world: World) -> None:
    config = {"model_type": "somebodys", "auto_map": {"AutoModelForCausalLM": "theirs.Model"}, "vocab_size": 11}
    base = world.base(config, {"h.proj.weight": torch.ones(4, 4)})
    with pytest.raises(UnsupportedPatchError, match="its layout is unknown"):
        make_plan(world.patch({"h.proj": lora(4, 4)}, fan_in_fan_out=True), base)


def test_fan_in_fan_out_on_plain_linears_is_what_peft_makes_of_it(world: World) -> None:
    base = world.base(LLAMA, {"model.q_proj.weight": torch.ones(4, 4)})
    pair = torch.ones(2, 4), torch.arange(4.0).unsqueeze(1).expand(4, 2).contiguous()
    plan = make_plan(world.patch({"model.q_proj": pair}, fan_in_fan_out=True), base)
    edit = plan.changes["model.q_proj.weight"].edit
    assert edit is not None
    added = edit().exact(torch.zeros(4, 4, dtype=torch.float64))
    assert torch.equal(added, torch.arange(4.0, dtype=torch.float64).unsqueeze(1).expand(4, 4) * 4)


def test_quantised_bases_are_refused(world: World) -> None:
    with pytest.raises(CheckpointError, match="is quantised .*bitsandbytes"):
        world.plan({Q: lora(6, 4)}, {**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}})


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_dtypes_we_do_not_round_to_are_refused(dtype: torch.dtype, world: World) -> None:
    base = world.base(LLAMA, {f"{Q}.weight": torch.ones(6, 4).to(dtype)})
    with pytest.raises(CheckpointError, match=f"{Q}.weight has dtype"):
        make_plan(world.patch({Q: lora(6, 4)}), base)


class TestSavedBaseWeights:
    """PEFT saves lm_head.base_layer.weight beside LoRA on the head; it must be a copy of a base we can see."""

    def patch(self, world: World, weight: torch.Tensor) -> Patch:
        extra = {"base_model.model.lm_head.base_layer.weight": weight}
        return world.patch({"lm_head": lora(11, 4)}, extra=extra)

    def check(self, patch: Patch, new: Base, old: Base | None) -> None:
        check_saved(patch, new, old)

    def test_a_copy_of_the_new_base_is_fine(self, world: World) -> None:
        self.check(self.patch(world, torch.ones(11, 4).bfloat16()), world.base(), None)

    def test_a_copy_of_the_old_base_is_fine_when_that_is_shown(self, world: World) -> None:
        patch, new = self.patch(world, torch.full((11, 4), 2.0)), world.base()
        old = world.base(tensors={**TENSORS, "lm_head.weight": torch.full((11, 4), 2.0)}, name="old")
        self.check(patch, new, old)
        with pytest.raises(UnsupportedPatchError, match=r"lm_head\.base_layer\.weight.*pass that base as --from"):
            self.check(patch, new, None)

    def test_a_copy_of_neither_is_refused(self, world: World) -> None:
        with pytest.raises(UnsupportedPatchError, match="is this the base it was trained on"):
            self.check(self.patch(world, torch.full((11, 4), 2.0)), world.base(), world.base(name="old"))

    def test_of_a_grown_vocabulary_the_first_rows_are_a_copy(self, world: World) -> None:
        self.check(self.patch(world, torch.ones(12, 4)), world.base(), None)

    def test_of_a_grown_vocabulary_other_first_rows_are_refused(self, world: World) -> None:
        other = torch.cat([torch.full((1, 4), 2.0), torch.ones(11, 4)])
        with pytest.raises(UnsupportedPatchError, match="expected a copy of the old base's"):
            self.check(self.patch(world, other), world.base(), None)

    def test_a_shrunk_vocabulary_is_refused(self, world: World) -> None:
        with pytest.raises(ShapeError, match="carries a base weight of 10×4"):
            self.check(self.patch(world, torch.ones(10, 4)), world.base(), None)
