"""The plan of a port: every tensor of a patch matched to tensors of a base, or refused by name.

Names in the patch are those of the model in memory when it was trained; the base's layout maps each to its tensors on
disk. Names that are no longer in memory but are on disk (experts that newer transformers fuse) are used as they are.
The law: the planned checkpoint computes what PEFT's unmerged adapter computes on the same base.
"""

from __future__ import annotations

from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import Base
from portllm.checkpoint.planning.changes import ChangeSet, Plan
from portllm.checkpoint.planning.refusals import refuse_adapter, refuse_by_headers, refuse_by_values
from portllm.checkpoint.planning.replacements import add_replacements, check_vocabulary
from portllm.checkpoint.planning.tying import settle
from portllm.checkpoint.planning.updates import add_updates


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


def plan_port(patch: Patch, base: Base, *, output: str, scale: float = 1.0, old: Base | None = None) -> Plan:
    """Return the plan of a port, after every refusal: nothing that is written later depends on further checks.

    `output` is merged or adapter. Reads the patch's tensors. Raises as `make_plan`, and PatchError.
    """
    plan = make_plan(patch, base, scale=scale, old=old)
    refuse_by_values(patch, base, old)
    if output == "adapter":
        refuse_adapter(patch, plan)
    return plan
