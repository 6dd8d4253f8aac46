"""Measure the weights: drift per module between releases, and the residual that a port drops.

Tensors are read one at a time: memory is bounded by the largest tensor, not by the checkpoint.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.errors import CheckpointError, DataError, PatchError, UnmatchedModulesError, UnsupportedPatchError
from portllm.params import Params
from portllm.reporting.results import missing

if TYPE_CHECKING:
    from torch import Tensor

    from portllm.algebra.residual import ScaledFactors

# <where>.<layer>.<kind>, as in model.layers.3.self_attn.q_proj
LAYERED = re.compile(r"^(?P<where>.*?)\.(?P<layer>\d+)\.(?P<kind>.+)$")


@dataclass(frozen=True, kw_only=True)
class ModuleDrift:
    """Drift of one module (all experts of a layer count as one); `layer` is None outside the layers."""

    module: str
    layer: int | None
    kind: str
    drift_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """`release` against an earlier one: ‖θ' − θ‖_F / ‖θ‖_F in all and per module."""

    release: str
    against: str
    overall: float | None
    modules: tuple[ModuleDrift, ...]
    not_compared: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Norms over the adapted modules: Δ carried over, Δ' re-tuned, R = Δ' − Δ, and θ' + Δ."""

    release: str
    task: str
    patch_norm: float
    retuned_norm: float
    residual_norm: float
    ported_norm: float
    cosine: float | None

    @property
    def over_weights(self) -> float:
        """Return ‖R‖/‖θ' + Δ‖."""
        return self.residual_norm / self.ported_norm

    @property
    def over_patch(self) -> float | None:
        """Return ‖R‖/‖Δ‖; None for a patch of zeros."""
        return self.residual_norm / self.patch_norm if self.patch_norm else None


@dataclass(frozen=True, kw_only=True)
class Unmeasured:
    """A residual that cannot be computed from factors alone (not plain LoRA, or modules named otherwise), and why."""

    release: str
    task: str
    reason: str


def drifts(params: Params, models: Path) -> tuple[Drift, ...]:
    """Return the drift of every later release against the first and against the one it came from. Raises DataError."""
    first, rows = params.releases[0], []
    for release in params.releases[1:]:
        base = params.evolve.releases[release].base
        for against in dict.fromkeys((first, base)):
            rows.append(_drift(models, release, against))
    return tuple(rows)


def residuals(params: Params, models: Path) -> tuple[Residual | Unmeasured, ...]:
    """Return the residual of every release and task that has a re-tuned patch. Raises DataError."""
    first, patches, rows = params.releases[0], models / "patches", []
    for release in params.releases[1:]:
        for task in params.tasks:
            if (patches / release / task).is_dir():
                rows.append(_measured(patches / first / task, patches / release / task, models, release, task))
    return tuple(rows)


def _drift(models: Path, release: str, against: str) -> Drift:
    from portllm.algebra.drift import ratio, squared_distance, squared_norm

    new, old = _release(models, release), _release(models, against)
    shared = [n for n in new.names if n in set(old.names) and new.entry(n).shape == old.entry(n).shape]
    parts: dict[tuple[str, int | None, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name in shared:
        before = old.entry(name).read()
        if not before.is_floating_point():
            continue
        part = parts[_place(name)]
        part[0] += squared_distance(new.entry(name).read(), before)
        part[1] += squared_norm(before)
    modules = tuple(
        ModuleDrift(module=module, layer=layer, kind=kind, drift_ratio=ratio(*part))
        for (module, layer, kind), part in parts.items()
    )
    return Drift(
        release=release,
        against=against,
        overall=ratio(sum(p[0] for p in parts.values()), sum(p[1] for p in parts.values())),
        modules=_with_short_kinds(modules),
        not_compared=tuple(sorted((set(new.names) | set(old.names)) - set(shared))),
    )


def _place(name: str) -> tuple[str, int | None, str]:
    """Return (module, layer, kind) of a tensor; modules numbered inside a layer (experts) are one kind."""
    module = name.removesuffix(".weight")
    match = LAYERED.match(module)
    if not match:
        return module, None, module
    kind = re.sub(r"\.\d+(?=\.|$)", ".*", match["kind"])
    layer = int(match["layer"])
    return f"{match['where']}.{layer}.{kind}", layer, f"{match['where']}.{kind}"


def _with_short_kinds(modules: tuple[ModuleDrift, ...]) -> tuple[ModuleDrift, ...]:
    """Name kinds by their last part where that is unambiguous (`q_proj`), else in full."""
    kinds = dict.fromkeys(m.kind for m in modules)
    endings = [_ending(kind) for kind in kinds]
    short = {kind: end if endings.count(end) == 1 else kind for kind, end in zip(kinds, endings, strict=True)}
    return tuple(
        ModuleDrift(module=m.module, layer=m.layer, kind=short[m.kind], drift_ratio=m.drift_ratio) for m in modules
    )


def _ending(kind: str) -> str:
    parts = kind.split(".")
    return ".".join(parts[-2:]) if parts[-1] in ("bias", "*") and len(parts) > 1 else parts[-1]


def _measured(carried: Path, retuned: Path, models: Path, release: str, task: str) -> Residual | Unmeasured:
    try:
        return _residual(carried, retuned, models, release, task)
    except PatchError as error:
        # the scores are valid without it: report the reason instead of failing
        return Unmeasured(release=release, task=task, reason=str(error))


def _residual(carried: Path, retuned: Path, models: Path, release: str, task: str) -> Residual:
    from portllm.algebra.residual import squared_patched

    old, new, base = _patch(carried), _patch(retuned), _release(models, release)
    patch = again = residual = ported = cross = 0.0
    for module, weight in _adapted(base, old, new):
        left, right = _factors(old, module, weight), _factors(new, module, weight)
        patch += left.dot(left)
        again += right.dot(right)
        cross += left.dot(right)
        gap = right.minus(left)
        residual += gap.dot(gap)
        ported += squared_patched(weight, left)
    return Residual(
        release=release,
        task=task,
        patch_norm=_root(patch),
        retuned_norm=_root(again),
        residual_norm=_root(residual),
        ported_norm=_root(ported),
        cosine=cross / math.sqrt(patch * again) if patch > 0 and again > 0 else None,
    )


def _adapted(base: Checkpoint, old: Patch, new: Patch) -> Iterator[tuple[str, Tensor]]:
    """Yield the modules that either patch adapts, each with its weight as (out, in)."""
    for module in sorted(set(old.modules) | set(new.modules)):
        if f"{module}.weight" not in base.names:
            raise UnmatchedModulesError(f"{base.path}: has no {module}.weight, which a patch adapts")
        weight = base.entry(f"{module}.weight").read()
        pair = old.modules.get(module) or new.modules[module]
        yield module, weight.T if old.fan_in_fan_out and pair.kind == "linear" else weight


def _factors(patch: Patch, module: str, weight: Tensor) -> ScaledFactors:
    from portllm.algebra.residual import ScaledFactors

    if module in patch.modules:
        pair = patch.modules[module]
        return ScaledFactors(pair.a, pair.b, pair.scaling)
    # a module that only the other patch adapts: Δ is zero there
    return ScaledFactors(weight.new_zeros(1, weight.shape[1]), weight.new_zeros(weight.shape[0], 1), 1.0)


def _root(squared: float) -> float:
    # a sum of products may come out a rounding below zero
    return math.sqrt(max(0.0, squared))


def _release(models: Path, release: str) -> Checkpoint:
    path = models / "releases" / release
    if not path.is_dir():
        raise missing(path, "evolve")
    try:
        return Checkpoint.open(path)
    except CheckpointError as error:
        raise DataError(f"{path}: cannot be read for the report: {error}") from error


def _patch(path: Path) -> Patch:
    if not path.is_dir():
        raise missing(path, "train")
    patch = Patch.open(path)
    if patch.beyond:
        raise UnsupportedPatchError(f"{path}: has {patch.beyond}, expected plain LoRA, whose updates can be compared")
    return patch
