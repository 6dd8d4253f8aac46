"""The plan of a port: every tensor of a patch matched to tensors of a base, or refused by name.

Names in the patch are those of the model in memory when it was trained; the base's layout maps each to its tensors on
disk. Names that are no longer in memory but are on disk (experts that newer transformers fuse) are used as they are.
The law: the planned checkpoint computes what PEFT's unmerged adapter computes on the same base.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import Base
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.planning.changes import ChangeSet, Plan
from portllm.checkpoint.planning.refusals import refuse_adapter, refuse_by_headers, refuse_by_values
from portllm.checkpoint.planning.replacements import add_replacements, check_vocabulary
from portllm.checkpoint.planning.tying import settle
from portllm.checkpoint.planning.updates import add_updates
from portllm.checkpoint.record.provenance import COMPUTING, configs, public_name, revision, versions
from portllm.checkpoint.record.records import PortRecord, Source
from portllm.errors import ParamsError, PatchError
from portllm.params import PortParams


def make_plan(patch: Patch, base: Base, *, scale: float = 1.0, old: Base | None = None) -> Plan:
    """Match every part of `patch` to tensors of `base`, from headers.

    Tensors are read only where the patch holds what looks like a copy of another of its own. `scale` multiplies Δ.
    `old` is needed where the patch's meaning depends on it (PiSSA, OLoRA). Raises CheckpointError (quantised base),
    UnmatchedModulesError, ShapeError, UnsupportedPatchError or ParamsError, naming what does not fit.
    """
    refuse_by_headers(patch, base, scale)
    changes = ChangeSet(base)
    add_updates(changes, patch, scale=scale, old=old)
    add_replacements(changes, patch)
    settle(changes, patch)
    check_vocabulary(changes)
    return changes.plan()


def plan_port(patch: Patch, base: Base, params: PortParams, *, old: Base | None = None) -> tuple[Plan, PortRecord]:
    """Return the plan of a port and its record so far, after every refusal: what is written later needs no checks.

    Reads the patch's tensors. Raises as `make_plan`, and PatchError where `old` is not the base of the patch's record.
    """
    if not math.isfinite(params.scale):
        raise ParamsError(f"port.scale must be a finite number, found {params.scale}")
    plan = make_plan(patch, base, scale=params.scale, old=old)
    refuse_by_values(patch, base, old)
    if params.as_ == "adapter":
        refuse_adapter(patch, plan)
    return plan, _begin_record(patch, base, plan, params, old)


def _begin_record(patch: Patch, base: Base, plan: Plan, params: PortParams, old: Base | None) -> PortRecord:
    """Return the record as far as it is known before anything is written."""
    return PortRecord(
        base=_source(base.path, None),
        patch=_source(patch.path, fingerprint(patch.path)),
        trained_on=_trained_on(patch, old.path if old is not None else None),
        task=patch.record.task if patch.record else None,
        method=params.method,
        output=params.as_,
        scale=params.scale,
        modules={"matched": plan.matched, "total": plan.total},
        tensors=plan.tensors(base),
        configs=configs(base.path, patch.path),
        versions=versions(*COMPUTING),
    )


def _trained_on(patch: Patch, source: Path | None) -> Source | None:
    """Return the base the patch was trained on, as far as known. Raises PatchError where `source` is another one."""
    digest = fingerprint(source) if source is not None else None
    if patch.record is not None:
        expected = patch.record.base.fingerprint
        if digest is not None and expected is not None and digest != expected:
            raise PatchError(
                f"{source}: has fingerprint {digest[:12]}, the patch was trained on {patch.record.base.name} with "
                f"fingerprint {expected[:12]}; pass that base as --from"
            )
        return dataclasses.replace(patch.record.base, fingerprint=expected or digest)
    if source is not None:
        return _source(source, digest)
    name, pinned = patch.config.get("base_model_name_or_path"), patch.config.get("revision")
    if not isinstance(name, str) or not name:
        return None
    return Source(name=public_name(Path(name)), fingerprint=None, revision=pinned if isinstance(pinned, str) else None)


def _source(path: Path, digest: str | None) -> Source:
    return Source(name=public_name(path), fingerprint=digest, revision=revision(path))
