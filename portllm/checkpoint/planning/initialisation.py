"""Patches whose beginning was taken out of the base (PiSSA, OLoRA), turned into plain LoRA of twice the rank.

Training started from B0 A0, made of the old base's weight, against W − s·B0 A0; so what the patch adds to a base
nothing was taken out of is s·(B1 A1 − B0 A0) = s·[B1 −B0] [A1; A0]. B0 A0 is computed again from the old base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm.checkpoint.adapter.factors import LoraPair
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import Base
from portllm.checkpoint.files.tensors import TensorEntry, times
from portllm.checkpoint.planning.low_rank import LowRank
from portllm.errors import ShapeError, UnmatchedModulesError, UnsupportedPatchError

if TYPE_CHECKING:
    from torch import Tensor


def derived(module: str, pair: LoraPair, patch: Patch, old: Base, scale: float) -> LowRank:
    """Return the update (out, in) of a linear module, of rank 2r. Raises PatchError where the old base does not fit."""
    entry, turned = _weight(module, pair, patch, old)

    def factors() -> tuple[Tensor, Tensor]:
        import torch

        from portllm.algebra import initialisation

        weight = entry.read()
        start = initialisation.pissa if patch.init == "pissa" else initialisation.olora
        a0, b0 = start(weight.T if turned else weight, pair.rank, pair.scaling)
        return torch.cat([pair.a.float(), a0]), torch.cat([pair.b.float(), -b0], dim=1)

    return LowRank(factors, pair.shape, scale * pair.scaling, (pair.a_entry.name, pair.b_entry.name))


def _weight(module: str, pair: LoraPair, patch: Patch, old: Base) -> tuple[TensorEntry, bool]:
    """Return (the module's weight on disk in the old base, whether it is stored as (in, out))."""
    blocks = old.layout.blocks.get(f"{module}.weight", ())
    if len(blocks) != 1 or pair.kind != "linear" or pair.magnitude is not None:
        raise UnsupportedPatchError(
            f"{module}: {patch.config.get('init_lora_weights')} is ported for linear modules without DoRA that are one "
            "tensor on disk; convert the patch to plain LoRA with PEFT where it was trained"
        )
    name = blocks[0].tensor
    if name not in old.tensors:
        raise UnmatchedModulesError(f"{module}: {old.path} has no {name}; is this the base it was trained on?")
    turned = (old.layout.modules[module].kind == "conv1d") != blocks[0].transposed
    entry = old.tensors[name]
    shape = entry.shape[::-1] if turned else entry.shape
    if shape != pair.shape:
        raise ShapeError(
            f"{module}: patch is {times(pair.shape)}, old base tensor {name} is {times(shape)}; "
            "is it the one trained on?"
        )
    return entry, turned
