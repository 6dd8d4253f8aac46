"""Patches whose beginning was taken out of the base (PiSSA, OLoRA), turned into plain LoRA of twice the rank.

Training started from B0 A0, made of the old base's weight, against W − s·B0 A0; so what the patch adds to a base nothing was
taken out of is s·(B1 A1 − B0 A0) = s·[B1 −B0] [A1; A0]. B0 A0 is computed again from the old base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from portllm.checkpoint.blocks import LowRank
from portllm.checkpoint.layout import Layout
from portllm.checkpoint.pairs import LoraPair
from portllm.checkpoint.patch import Patch
from portllm.checkpoint.reader import Checkpoint
from portllm.errors import ShapeError, UnmatchedModulesError, UnsupportedPatchError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Old:
    """The base the patch was made on, and where its parameters are."""

    base: Checkpoint
    layout: Layout


def derived(module: str, pair: LoraPair, patch: Patch, old: Old, scale: float) -> LowRank:
    """The update (out, in) of one linear module, of rank 2r. Raises PatchError where the old base does not fit."""
    name, turned = _weight(module, pair, patch, old)

    def factors() -> tuple[Tensor, Tensor]:
        import torch

        from portllm.algebra import initialisation

        weight = old.base.read(name)
        start = initialisation.pissa if patch.init == "pissa" else initialisation.olora
        a0, b0 = start(weight.T if turned else weight, pair.rank, pair.scaling)
        return torch.cat([pair.a.float(), a0]), torch.cat([pair.b.float(), -b0], dim=1)

    return LowRank(factors, pair.shape, scale * pair.scaling, (pair.a_entry.name, pair.b_entry.name))


def _weight(module: str, pair: LoraPair, patch: Patch, old: Old) -> tuple[str, bool]:
    """(the module's weight on disk in the old base, whether it is stored as (in, out))."""
    parts = old.layout.parts.get(f"{module}.weight", ())
    if len(parts) != 1 or pair.kind != "linear" or pair.magnitude is not None:
        raise UnsupportedPatchError(
            f"{module}: {patch.config.get('init_lora_weights')} is ported for linear modules without DoRA that are one tensor "
            "on disk; convert the patch to plain LoRA with PEFT where it was trained"
        )
    name = parts[0].tensor
    if name not in old.base.where:
        raise UnmatchedModulesError(f"{module}: {old.base.path} has no {name}; is this the base it was trained on?")
    turned = (old.layout.modules[module].kind == "conv1d") != parts[0].transposed
    shape = old.base.shape(name)[::-1] if turned else old.base.shape(name)
    if shape != pair.shape:
        found, expected = ("×".join(map(str, s)) for s in (shape, pair.shape))
        raise ShapeError(f"{module}: patch is {expected}, old base tensor {name} is {found}; is it the one trained on?")
    return name, turned
