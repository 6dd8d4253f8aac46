"""The plan of a port: every change, and every refusal.

    changes.py          Change, ChangeSet, Plan
    low_rank.py         a low-rank update, cut into the blocks of tensors on disk
    initialisation.py   PiSSA and OLoRA as plain LoRA
    updates.py          changes by LoRA, DoRA and lora_bias
    replacements.py     changes by saved modules, trained tokens, heads, grown vocabularies
    tying.py            tied embeddings and heads
    refusals.py         what is refused before anything is written
    planner.py          make_plan (from headers), plan_port (every refusal, the record begun)

Public names, imported on first use: `Change`, `Plan`, `make_plan`, `plan_port`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm import lazy

if TYPE_CHECKING:
    from portllm.checkpoint.planning.changes import Change as Change
    from portllm.checkpoint.planning.changes import Plan as Plan
    from portllm.checkpoint.planning.planner import make_plan as make_plan
    from portllm.checkpoint.planning.planner import plan_port as plan_port

_HOMES = {
    "Change": "changes",
    "Plan": "changes",
    "make_plan": "planner",
    "plan_port": "planner",
}
__getattr__ = lazy.exporter(__name__, _HOMES)
