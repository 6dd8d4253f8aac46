"""`portllm port PATCH --onto BASE --out D`: put a patch onto another release, without training.

θ' + scale · Δ (PortLLM, arXiv:2410.10870), streamed shard by shard; or the patch itself, re-targeted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint import fingerprint, provenance
from portllm.checkpoint.card import port_card
from portllm.checkpoint.files import companions, tokenizer_files
from portllm.checkpoint.headers import Header, TensorEntry
from portllm.checkpoint.output import refuse, staged
from portllm.checkpoint.patch import CONFIG, WEIGHTS, Patch
from portllm.checkpoint.plan import Change, Plan, check_saved, make_plan
from portllm.checkpoint.reader import INDEX, Checkpoint
from portllm.checkpoint.records import PortRecord, Source
from portllm.checkpoint.writer import Job, Meter, copy_file, plain_file, write_files, write_subset
from portllm.errors import OutputError, ParamsError, PatchError
from portllm.params import PortParams

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit

Progress = Callable[[int, int], None]
MARGIN_BYTES = 16 << 20  # records, card, directory entries


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
) -> PortRecord:
    """Port `patch` onto `onto`; `source` is the base it was trained on, if at hand. Returns port.json's record.

    With `dry_run` everything is checked from headers and nothing is written. `on_progress(bytes done, bytes in all)`.
    Raises PatchError, CheckpointError or OutputError; then nothing is written.
    """
    if not math.isfinite(params.scale):
        raise ParamsError(f"port.scale must be a finite number, found {params.scale}")
    inputs = [path for path in (patch, onto, source) if path is not None]
    if not dry_run:
        refuse(out, force=force, inputs=inputs)  # at once, not after reading for minutes
    lora, base = Patch.open(patch), Checkpoint.open(onto)
    plan = make_plan(lora, base)
    for pair in lora.modules.values():
        _ = pair.a, pair.b  # reading refuses what is not finite, before anything is written
    trained_on = _trained_on(lora, source)
    check_saved(lora, base, Checkpoint.open(source) if source is not None else None)
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
        tensors={"changed": plan.matched, "copied": len(base.where) - plan.matched},
        versions=provenance.versions("torch"),
    )
    if dry_run:
        return record
    with staged(out, force=force, inputs=inputs) as folder:
        write = _write_merged if params.as_ == "merged" else _write_adapter
        record = write(folder, lora, base, plan, record, on_progress)
        (folder / "README.md").write_text(port_card(record), encoding="utf-8")
        files = {**record.files, "README.md": fingerprint.file_digest(folder / "README.md")}
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


def _write_merged(
    folder: Path, patch: Patch, base: Checkpoint, plan: Plan, record: PortRecord, on_progress: Progress | None
) -> PortRecord:
    """Write the checkpoint's files into `folder`; returns the record with fingerprints and digests filled in."""
    extras = companions(base.path, patch.path)
    if (index := base.path / INDEX).is_file():
        extras[INDEX] = index
    meter = Meter(base.nbytes + sum(path.stat().st_size for path in extras.values()), on_progress)
    _check_space(folder, meter.total)
    files = {name: copy_file(path, _under(folder, name), meter) for name, path in extras.items()}
    shards = {folder / shard.path.name: shard for shard in base.shards}
    known = {e: digest for s in base.shards for e, digest in _known(s)}
    edits = {name: partial(_lora, change, record.scale) for name, change in plan.changes.items()}
    written = write_files([plain_file(shard, path, edits) for path, shard in shards.items()], Job(known, meter))
    before: dict[TensorEntry, str] = {}
    after: dict[TensorEntry, str] = {}
    for target, result in written.items():
        files[target.name] = result.sha256
        before.update(result.before)
        after.update(result.after)
        source = result.sources.get(shards[target].path, [])
        fingerprint.remember(shards[target], {e.name: digest for e, digest in result.before.items()}, source)
    return dataclasses.replace(
        record,
        base=dataclasses.replace(record.base, fingerprint=fingerprint.combine(before)),
        fingerprint=fingerprint.combine(after),
        files=files,
    )


def _lora(change: Change, scale: float) -> Edit:
    from portllm.algebra.lora import AddLora, Block, Update

    pair = change.pair
    a, b = (pair.b.T, pair.a.T) if change.transposed else (pair.a, pair.b)  # (B A)ᵀ = Aᵀ Bᵀ
    return AddLora(Block(Update(a, b, scale * pair.scaling)))


def _write_adapter(
    folder: Path, patch: Patch, base: Checkpoint, plan: Plan, record: PortRecord, on_progress: Progress | None
) -> PortRecord:
    """Write the patch, re-targeted to the base, into `folder`; returns the record with what it lacked."""
    extras = tokenizer_files(patch.path)
    meter = Meter(patch.header.size + sum(path.stat().st_size for path in extras.values()), on_progress)
    _check_space(folder, meter.total)
    files = {name: copy_file(path, _under(folder, name), meter) for name, path in extras.items()}
    # base weights saved with the patch stay behind: PEFT would put them over the new base's
    factors = patch.header.tensors.keys() - {entry.name for entry in patch.saved.values()}
    files[WEIGHTS] = write_subset(patch.header, factors, folder / WEIGHTS, meter)
    config = _retargeted(patch.config, record.base.name, record.scale)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    files[CONFIG] = fingerprint.file_digest(folder / CONFIG)
    return dataclasses.replace(
        record,
        base=dataclasses.replace(record.base, fingerprint=fingerprint.fingerprint(base.path)),
        fingerprint=fingerprint.fingerprint(folder),
        tensors={"changed": 0, "copied": 2 * plan.matched},
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


def _known(shard: Header) -> list[tuple[TensorEntry, str]]:
    known = fingerprint.cached(shard) or {}
    return [(shard.tensors[name], digest) for name, digest in known.items()]


def _under(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + MARGIN_BYTES:
        raise OutputError(
            f"{folder.parent}: has {free / 1e9:.1f} GB free, the ported files need {needed / 1e9:.1f} GB; "
            "free some space or choose another disk"
        )
