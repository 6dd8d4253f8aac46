"""port: put a patch onto another release of its base, without training.

θ' + scale · Δ (PortLLM, arXiv:2410.10870), streamed shard by shard; or the patch itself, re-targeted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import Base
from portllm.checkpoint.files.hashing import file_digest, fingerprint
from portllm.checkpoint.files.names import CARD
from portllm.checkpoint.files.output import refuse, staged
from portllm.checkpoint.files.progress import Progress
from portllm.checkpoint.planning.changes import Plan
from portllm.checkpoint.planning.planner import plan_port
from portllm.checkpoint.record.card import Facts, port_card
from portllm.checkpoint.record.provenance import COMPUTING, configs, public_name, revision, versions
from portllm.checkpoint.record.records import PortRecord, Source
from portllm.checkpoint.writing.adapter import write_adapter
from portllm.checkpoint.writing.ported import Ported, write_merged
from portllm.errors import ParamsError, PatchError
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
    if not math.isfinite(params.scale):
        raise ParamsError(f"port.scale must be a finite number, found {params.scale}")
    inputs = [path for path in (patch, onto, source) if path is not None]
    if not dry_run:
        refuse(out, force=force, inputs=inputs)  # at once, not after reading for minutes
    lora, base = Patch.open(patch), open_base(onto)
    old = open_base(source) if source is not None else None
    plan = plan_port(lora, base, output=params.as_, scale=params.scale, old=old)
    record = _record(lora, base, plan, params, source)
    if on_plan is not None:
        on_plan(plan)
    if dry_run:
        return record
    with staged(out, force=force, inputs=inputs) as folder:
        if params.as_ == "merged":
            ported = write_merged(folder, lora, base, plan, on_progress)
        else:
            ported = write_adapter(
                folder, lora, base, old, name=record.base.name, scale=params.scale, on_progress=on_progress
            )
        return _complete(record, ported, folder, lora, base)


def _record(patch: Patch, base: Base, plan: Plan, params: PortParams, source: Path | None) -> PortRecord:
    """Return the record as far as it is known before anything is written."""
    return PortRecord(
        base=Source(name=public_name(base.path), fingerprint=None, revision=revision(base.path)),
        patch=Source(name=public_name(patch.path), fingerprint=fingerprint(patch.path), revision=revision(patch.path)),
        trained_on=_trained_on(patch, source),
        task=patch.record.task if patch.record else None,
        method=params.method,
        output=params.as_,
        scale=params.scale,
        modules={"matched": plan.matched, "total": plan.total},
        tensors=plan.tensors(base),
        configs=configs(base.path, patch.path),
        versions=versions(*COMPUTING),
    )


def _complete(record: PortRecord, ported: Ported, folder: Path, patch: Patch, base: Base) -> PortRecord:
    """Write the card and port.json of what is written in `folder`, which makes it complete."""
    record = record.completed(**dataclasses.asdict(ported))
    (folder / CARD).write_text(port_card(record, Facts.of(folder, base.path, patch.path)), encoding="utf-8")
    files = {**record.files, CARD: file_digest(folder / CARD, "blake3")}
    record = dataclasses.replace(record, files=dict(sorted(files.items())))
    record.write(folder)
    return record


def _trained_on(patch: Patch, source: Path | None) -> Source | None:
    """Return the base the patch was trained on, as far as known. Raises PatchError when `source` is another one."""
    found = fingerprint(source) if source is not None else None
    if patch.record is not None:
        expected = patch.record.base.fingerprint
        if found is not None and expected is not None and found != expected:
            raise PatchError(
                f"{source}: has fingerprint {found[:12]}, the patch was trained on {patch.record.base.name} with "
                f"fingerprint {expected[:12]}; pass that base as --from"
            )
        return dataclasses.replace(patch.record.base, fingerprint=expected or found)
    if source is not None:
        return Source(name=public_name(source), fingerprint=found, revision=revision(source))
    name = patch.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    pinned = patch.config.get("revision")
    return Source(name=public_name(Path(name)), fingerprint=None, revision=pinned if isinstance(pinned, str) else None)
