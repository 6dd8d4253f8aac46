"""Low-rank updates in a plan: LoRA of modules and of stacked parameters, DoRA, and the biases of lora_bias."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from portllm.checkpoint.adapter.factors import LoraPair
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.adapter.targeting import stack_pairs
from portllm.checkpoint.base.base import RELEASE, Base
from portllm.checkpoint.base.layout import StoredBlock
from portllm.checkpoint.files.tensors import times
from portllm.checkpoint.planning.changes import ChangeSet
from portllm.checkpoint.planning.initialisation import derived
from portllm.checkpoint.planning.low_rank import (
    BlockUpdate,
    FactorCache,
    LowRank,
    block_updates,
    of_expert,
    of_pair,
    overlap,
)
from portllm.errors import ShapeError, UnmatchedModulesError, UnsupportedPatchError

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit


def add_updates(changes: ChangeSet, patch: Patch, *, scale: float, old: Base | None) -> None:
    """Add the changes by the low-rank updates of `patch`. Raises PatchError or what derives from it."""
    updates = _Updates(changes, patch, scale, old)
    for module, pair in patch.modules.items():
        updates.add_pair(module, pair)
    for owner, stack in patch.stacks.items():
        updates.add_stack(owner, stack)
    updates.finish()


class _Updates:
    """The updates of one patch; those of one tensor on disk are collected, as they become one change."""

    def __init__(self, changes: ChangeSet, patch: Patch, scale: float, old: Base | None) -> None:
        self._changes, self._base, self._patch = changes, changes.base, patch
        self._scale, self._old = scale, old
        self._by_tensor: defaultdict[str, list[BlockUpdate]] = defaultdict(list)
        self._cache = FactorCache()

    def add_pair(self, module: str, pair: LoraPair) -> None:
        """Add the update of a linear module or embedding."""
        self._changes.modules.add(self._base.in_memory(module))
        blocks, shape = self._base.find(f"{module}.weight")
        if self._patch.fan_in_fan_out and self._base.config.get("auto_map"):
            raise UnsupportedPatchError(
                f"{module}: the patch says fan_in_fan_out and the base runs code of its own (auto_map), so its layout "
                "is unknown; expected a model_type that transformers has built in"
            )
        update = self._update(module, pair)
        if self._base.kind(module) == "conv1d":
            update = update.turned()
        if update.shape != shape:
            raise ShapeError(
                f"{module}: patch is {times(update.shape)}, base tensor {blocks[0].tensor} is {times(shape)}; {RELEASE}"
            )
        if pair.magnitude is not None:
            self._add_dora(module, pair, blocks, update)
        else:
            self._collect(block_updates(blocks, lambda _: update, self._base.shape))
        if pair.bias is not None:
            self._add_bias(module, pair)

    def add_stack(self, owner: str, stack: tuple[LoraPair, ...]) -> None:
        """Add the updates of a module's parameters (target_parameters), with or without an axis of experts."""
        module = self._base.layout.modules.get(owner)
        if module is None:
            raise UnmatchedModulesError(f"{owner}: {self._base.path} has no such module; {RELEASE}")
        for name, pair in stack_pairs(self._patch.config, owner, tuple(module.parameters), stack):
            parameter = f"{owner}.{name}"
            self._changes.modules.add(parameter)
            blocks, shape = self._base.find(parameter)
            turned = len(shape) == 3 and module.transposed
            experts = shape[0] if len(shape) == 3 else 1
            expected = (shape[-1], shape[-2]) if turned else (shape[-2], shape[-1])
            if pair.shape != expected or pair.experts != experts:
                raise ShapeError(
                    f"{parameter}: the patch holds {pair.experts} updates of {times(pair.shape)}, the base {experts} "
                    f"matrices of {times(expected)}; {RELEASE}"
                )

            def update(expert: int, pair: LoraPair = pair, experts: int = experts, turned: bool = turned) -> LowRank:
                one = of_expert(pair, experts, expert, self._scale, self._cache)
                return one.turned() if turned else one

            self._collect(block_updates(blocks, update, self._base.shape))

    def finish(self) -> None:
        """Add one change per tensor on disk. Raises UnmatchedModulesError where two updates overlap."""
        for tensor, group in self._by_tensor.items():
            if overlap(group):
                first, second = (group[0].update.sources[0], group[-1].update.sources[0])
                raise UnmatchedModulesError(
                    f"{first} and {second} are both {tensor} of {self._base.path}; expected one update each"
                )
            sources = dict.fromkeys(name for update in group for name in update.update.sources)
            self._changes.add(tensor, partial(_sum, group), "W + s·BA", tuple(sources))

    def _collect(self, updates: Iterable[BlockUpdate]) -> None:
        for update in updates:
            self._by_tensor[update.tensor].append(update)

    def _update(self, module: str, pair: LoraPair) -> LowRank:
        if self._patch.init == "plain":
            return of_pair(pair, self._scale)
        if self._old is None:
            start = self._patch.config.get("init_lora_weights")
            raise UnsupportedPatchError(
                f"{self._patch.path}: init_lora_weights={start} took a part out of "
                "the base it was trained on, expected that base to compute it again; pass it as --from"
            )
        return derived(module, pair, self._patch, self._old, self._scale)

    def _add_dora(self, module: str, pair: LoraPair, blocks: tuple[StoredBlock, ...], update: LowRank) -> None:
        entry = pair.magnitude
        tensor = self._base.complete_tensor(module, blocks, "DoRA")
        turned = blocks[0].transposed
        update = update.turned() if turned else update
        outputs = int((self._base.kind(module) == "linear") == turned)
        size = math.prod(entry.shape) if entry is not None else 1
        if size != update.shape[outputs]:
            raise ShapeError(f"{module}: the patch has {size} magnitudes, expected {update.shape[outputs]}; {RELEASE}")

        def edit() -> Edit:
            import torch

            from portllm.algebra.edits import Dora

            a, b = map(torch.as_tensor, update.factors())
            return Dora(a, b, update.scale, pair.magnitude_values, outputs=outputs)

        sources = (*update.sources, entry.name if entry is not None else "")
        self._changes.add(tensor, edit, "m · (W + s·BA) / ‖W + s·BA‖", sources)

    def _add_bias(self, module: str, pair: LoraPair) -> None:
        name = self._base.stored_tensor(f"{module}.bias")
        if name is None or pair.bias is None:
            raise UnsupportedPatchError(
                f"{self._base.path}: {module} has no bias on disk, so lora_bias has nowhere to go; expected a base "
                "with biases, train the patch without lora_bias"
            )
        if self._base.shape(name) != pair.bias.shape:
            raise ShapeError(
                f"{module}: the patch's bias is {times(pair.bias.shape)}, the base's {times(self._base.shape(name))}; "
                f"{RELEASE}"
            )

        def edit() -> Edit:
            from portllm.algebra.edits import AddVector

            return AddVector(pair.bias_values, self._scale * pair.scaling)

        self._changes.add(name, edit, "b + s·b_B", (pair.bias.name,))


def _sum(group: Sequence[BlockUpdate]) -> Edit:
    from portllm.algebra.sums import AddLora, PlacedUpdate, Update

    blocks = ((one, *one.update.factors()) for one in group)
    return AddLora(*(PlacedUpdate(Update(a, b, one.update.scale), one.row, one.column) for one, a, b in blocks))
