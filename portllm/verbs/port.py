"""`portllm port PATCH --onto BASE --out D`: put a patch onto another release, without training.

θ' + scale · Δ (PortLLM, arXiv:2410.10870), streamed shard by shard; or the patch itself, re-targeted.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from portllm.checkpoint.adapter.patch import CONFIG, WEIGHTS, Patch
from portllm.checkpoint.base.checkpoint import Checkpoint, check_finite
from portllm.checkpoint.files import hashing as fingerprint
from portllm.checkpoint.files.names import tokenizer_files
from portllm.checkpoint.files.output import check_room, refuse, staged
from portllm.checkpoint.planning.changes import Plan, check_saved
from portllm.checkpoint.planning.initialisation import Old, converted
from portllm.checkpoint.planning.planner import make_plan
from portllm.checkpoint.planning.tying import check_sides
from portllm.checkpoint.record import provenance
from portllm.checkpoint.record.card import Facts, port_card
from portllm.checkpoint.record.records import PortRecord, Source
from portllm.checkpoint.writing.ported import under, write_merged
from portllm.checkpoint.writing.writer import Job, Meter, copy_file, write_files, write_subset
from portllm.errors import ParamsError, PatchError, UnsupportedPatchError
from portllm.lm.names.layout import layout_of, old_base
from portllm.params import PortParams

Progress = Callable[[int, int], None]


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
    """Port `patch` onto `onto`; `source` is the base it was trained on, if at hand. Returns port.json's record.

    With `dry_run` everything is checked from headers and nothing is written. `on_plan` is given the plan before that,
    `on_progress(bytes done, bytes in all)` is called as it is carried out. Raises PatchError, CheckpointError or
    OutputError; then nothing is written.
    """
    if not math.isfinite(params.scale):
        raise ParamsError(f"port.scale must be a finite number, found {params.scale}")
    inputs = [path for path in (patch, onto, source) if path is not None]
    if not dry_run:
        refuse(out, force=force, inputs=inputs)  # at once, not after reading for minutes
    lora, base = Patch.open(patch), Checkpoint.open(onto)
    old = old_base(source)
    layout = layout_of(base)
    plan = make_plan(lora, base, layout, scale=params.scale, old=old)
    for entry in lora.header.tensors.values():
        check_finite(lora.header.path, entry)  # before anything is written
    trained_on = _trained_on(lora, source)
    check_saved(lora, layout, base, old.base if old else None)
    check_sides(lora, layout)
    record = PortRecord(
        base=Source(name=provenance.public_name(onto), fingerprint=None, revision=provenance.revision(onto)),
        patch=Source(
            name=provenance.public_name(patch),
            fingerprint=fingerprint.fingerprint(patch),
            revision=provenance.revision(patch),
        ),
        trained_on=trained_on,
        task=lora.record.task if lora.record else None,
        method=params.method,
        output=params.as_,
        scale=params.scale,
        modules={"matched": plan.matched, "total": plan.total},
        tensors=plan.tensors(base),
        configs=provenance.configs(onto, patch),
        versions=provenance.versions(*provenance.COMPUTING),
    )
    if params.as_ == "adapter" and plan.extended:
        raise UnsupportedPatchError(
            f"{patch}: the vocabulary grew, and the new rows of {plan.extended[0]} are in a copy of the base's weight, "
            "which no adapter can carry to another base; expected --as merged"
        )
    if on_plan is not None:
        on_plan(plan)
    if dry_run:
        return record
    with staged(out, force=force, inputs=inputs) as folder:
        if params.as_ == "merged":
            merged = write_merged(folder, lora, base, plan, on_progress)
            record = dataclasses.replace(
                record,
                base=dataclasses.replace(record.base, fingerprint=merged.base_fingerprint),
                fingerprint=merged.fingerprint,
                files=merged.files,
            )
        else:
            record = _write_adapter(folder, lora, base, old, record, on_progress)
        card = port_card(record, Facts.of(folder, onto, patch))
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = {**record.files, "README.md": fingerprint.file_digest(folder / "README.md", "blake3")}
        record = dataclasses.replace(record, files=dict(sorted(files.items())))
        record.write(folder)
    return record


def _trained_on(patch: Patch, source: Path | None) -> Source | None:
    """The base the patch was trained on, as far as it is known. Raises PatchError when `source` is another one."""
    found = fingerprint.fingerprint(source) if source is not None else None
    if patch.record is not None:
        expected = patch.record.base.fingerprint
        if found is not None and expected is not None and found != expected:
            raise PatchError(
                f"{source}: has fingerprint {found[:12]}, the patch was trained on {patch.record.base.name} with "
                f"fingerprint {expected[:12]}; pass that base as --from"
            )
        return dataclasses.replace(patch.record.base, fingerprint=expected or found)
    if source is not None:
        return Source(name=provenance.public_name(source), fingerprint=found, revision=provenance.revision(source))
    name = patch.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    revision = patch.config.get("revision")
    return Source(
        name=provenance.public_name(Path(name)),
        fingerprint=None,
        revision=revision if isinstance(revision, str) else None,
    )


def _write_adapter(
    folder: Path, patch: Patch, base: Checkpoint, old: Old | None, record: PortRecord, on_progress: Progress | None
) -> PortRecord:
    """Write the patch, re-targeted to the base, into `folder`; returns the record with what it lacked."""
    extras = tokenizer_files(patch.path)
    # base weights saved with the patch stay behind: PEFT would put them over the new base's
    names = patch.header.tensors.keys() - patch.left_behind
    meter = Meter(patch.header.size + sum(path.stat().st_size for path in extras.values()), on_progress)
    check_room(folder, 2 * meter.total, "the ported files need")
    files = {name: copy_file(path, under(folder, name), meter) for name, path in extras.items()}
    config = _retargeted(patch.config, record.base.name, record.scale)
    if patch.init == "plain" or old is None:
        files[WEIGHTS] = write_subset(patch.header, names, folder / WEIGHTS, meter)
    else:
        file, config = converted(patch, old, config, folder / WEIGHTS)
        files[WEIGHTS] = write_files([file], Job({}, meter))[file.path].digest
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    files[CONFIG] = fingerprint.file_digest(folder / CONFIG, "blake3")
    return dataclasses.replace(
        record,
        base=dataclasses.replace(record.base, fingerprint=fingerprint.fingerprint(base.path)),
        fingerprint=fingerprint.fingerprint(folder),
        tensors={"changed": 0, "copied": len(names)},
        files=files,
    )


def _retargeted(config: Mapping[str, Any], name: str, scale: float) -> dict[str, Any]:
    tree = {**config, "base_model_name_or_path": name, "revision": None}
    if scale != 1.0:
        alphas = config.get("alpha_pattern") or {}
        tree["alpha_pattern"] = {key: alpha * scale for key, alpha in alphas.items()}
        if config.get("lora_alpha") is not None:  # it may be left out where a pattern covers every module
            tree["lora_alpha"] = config["lora_alpha"] * scale
    return tree
