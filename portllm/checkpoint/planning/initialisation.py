"""Patches whose beginning was taken out of the base (PiSSA, OLoRA), turned into plain LoRA of twice the rank.

Training started from B0 A0, made of the old base's weight, against W − s·B0 A0; so what the patch adds to a base
nothing was taken out of is s·(B1 A1 − B0 A0) = s·[B1 −B0] [A1; A0]. B0 A0 is computed again from the old base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.adapter.factors import LoraPair
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.base.layout import Layout
from portllm.checkpoint.files.headers import TensorEntry, times
from portllm.checkpoint.planning.low_rank import LowRank
from portllm.checkpoint.writing.placing import laid_out
from portllm.checkpoint.writing.targets import Target, TargetFile
from portllm.errors import ShapeError, UnmatchedModulesError, UnsupportedPatchError

if TYPE_CHECKING:
    from torch import Tensor

    from portllm.algebra.edits import Edit


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
            f"{module}: {patch.config.get('init_lora_weights')} is ported for linear modules without DoRA that are one "
            "tensor on disk; convert the patch to plain LoRA with PEFT where it was trained"
        )
    name = parts[0].tensor
    if name not in old.base.where:
        raise UnmatchedModulesError(f"{module}: {old.base.path} has no {name}; is this the base it was trained on?")
    turned = (old.layout.modules[module].kind == "conv1d") != parts[0].transposed
    shape = old.base.shape(name)[::-1] if turned else old.base.shape(name)
    if shape != pair.shape:
        raise ShapeError(
            f"{module}: patch is {times(pair.shape)}, old base tensor {name} is {times(shape)}; "
            "is it the one trained on?"
        )
    return name, turned


def converted(patch: Patch, old: Old, config: Mapping[str, Any], path: Path) -> tuple[TargetFile, dict[str, Any]]:
    """(the patch as plain LoRA of twice the rank in fp32, to be written to `path`; its config), scaling unchanged."""
    targets = []
    for module, pair in patch.modules.items():
        update = derived(module, pair, patch, old, 1.0)
        shapes = (2 * pair.rank, pair.shape[1]), (pair.shape[0], 2 * pair.rank)
        for side, (entry, shape) in enumerate(zip((pair.a_entry, pair.b_entry), shapes, strict=True)):
            stored = TensorEntry(entry.name, "F32", shape, 0, 4 * shape[0] * shape[1])
            targets.append(Target(stored, None, partial(_factor, update, side)))
    tree = {**config, "init_lora_weights": True, "r": 2 * config["r"]}
    growth = math.sqrt(2) if config.get("use_rslora") else 2
    tree["lora_alpha"] = growth * config["lora_alpha"]
    tree["rank_pattern"] = {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()}
    tree["alpha_pattern"] = {key: growth * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()}
    return laid_out(targets, patch.header.metadata, path), tree


def _factor(update: LowRank, side: int) -> Edit:
    import torch

    from portllm.algebra.edits import Replace

    factor = torch.as_tensor(update.factors()[side]).contiguous()
    return Replace(lambda row, count: factor[row : row + count] if count >= 0 else factor)
