"""port: put a patch onto another release of its base, without training.

θ' + scale · Δ (PortLLM, arXiv:2410.10870), streamed shard by shard; or the patch itself, re-targeted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from portllm.checkpoint.adapter import Patch
from portllm.checkpoint.files.output import refuse, staged
from portllm.checkpoint.files.progress import Progress
from portllm.checkpoint.planning import Plan, plan_port
from portllm.checkpoint.record.card import complete
from portllm.checkpoint.record.records import PortRecord
from portllm.checkpoint.writing.adapter import write_port
from portllm.lm.names.layout import open_base
from portllm.params import PortParams


def run(
    *,
    patch: Path,
    onto: Path,
    out: Path,
    params: PortParams,
    source: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> PortRecord:
    """Port `patch` onto `onto`; `source` is the base it was trained on, if available. Return port.json's record.

    With `dry_run` everything is checked and nothing is written. `on_plan` receives the plan before it is carried out.
    Raises PatchError, CheckpointError, ParamsError or OutputError; then nothing is written.
    """
    inputs = [path for path in (patch, onto, source) if path is not None]
    if not dry_run:
        refuse(out, force=force, inputs=inputs)  # at once, not after reading for minutes
    lora, base = Patch.open(patch), open_base(onto)
    old = open_base(source) if source is not None else None
    plan, record = plan_port(lora, base, params, old=old)
    if on_plan is not None:
        on_plan(plan)
    if dry_run:
        return record
    with staged(out, force=force, inputs=inputs) as folder:
        record = write_port(folder, lora, base, plan, record, old=old, on_progress=on_progress)
        return complete(record, folder, onto, patch)
