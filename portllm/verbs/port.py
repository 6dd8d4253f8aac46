"""`portllm port PATCH --onto BASE --out D`: put a patch onto another release, without training.

θ' + scale · Δ (PortLLM, arXiv:2410.10870), streamed shard by shard; or the patch itself, re-targeted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from portllm.checkpoint import fingerprint, provenance
from portllm.checkpoint.card import Facts, port_card
from portllm.checkpoint.derived import Old, converted
from portllm.checkpoint.files import companions, tokenizer_files
from portllm.checkpoint.headers import TensorEntry
from portllm.checkpoint.output import refuse, staged
from portllm.checkpoint.patch import CONFIG, WEIGHTS, Patch
from portllm.checkpoint.placing import nbytes
from portllm.checkpoint.plan import Plan, check_saved
from portllm.checkpoint.planning import make_plan
from portllm.checkpoint.reader import INDEX, Checkpoint, check_finite, read_json_object
from portllm.checkpoint.records import PortRecord, Source
from portllm.checkpoint.targets import TargetFile
from portllm.checkpoint.tying import check_sides
from portllm.checkpoint.writer import Job, Meter, Written, copy_file, write_files, write_subset
from portllm.errors import OutputError, ParamsError, PatchError, UnsupportedPatchError
from portllm.lm.naming import layout_of, old_base
from portllm.params import PortParams

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
            record = _write_merged(folder, lora, base, plan, record, on_progress)
        else:
            record = _write_adapter(folder, lora, base, old, record, on_progress)
        card = port_card(record, Facts.of(folder, onto, patch))
        (folder / "README.md").write_text(card, encoding="utf-8")
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
    targets = plan.files(base, folder)
    own = _own_files(base, plan, targets)
    extras = {name: path for name, path in companions(base.path, patch.path).items() if name not in own}
    if (index := base.path / INDEX).is_file() and INDEX not in own:
        extras[INDEX] = index
    meter = Meter(sum(map(nbytes, targets)) + sum(path.stat().st_size for path in extras.values()), on_progress)
    _check_space(folder, meter.total)
    files = {name: copy_file(path, _under(folder, name), meter) for name, path in extras.items()}
    for name, text in own.items():
        (folder / name).write_text(text, encoding="utf-8")
        files[name] = fingerprint.file_digest(folder / name)
    written = write_files(targets, Job(_known(base), meter))
    files.update({path.name: result.sha256 for path, result in written.items()})
    after = {entry: digest for result in written.values() for entry, digest in result.after.items()}
    return dataclasses.replace(
        record,
        base=dataclasses.replace(record.base, fingerprint=_base_fingerprint(base, written)),
        fingerprint=fingerprint.combine(after),
        files=files,
    )


def _base_fingerprint(base: Checkpoint, written: Mapping[Path, Written]) -> str:
    """The base's fingerprint out of the digests taken while its tensors passed; they are kept for the next time."""
    before = {entry: digest for result in written.values() for entry, digest in result.before.items()}
    sources = {path: was for result in written.values() for path, was in result.sources.items()}
    for shard in base.shards:
        if shard.path in sources and all(entry in before for entry in shard.tensors.values()):
            known = {name: before[entry] for name, entry in shard.tensors.items()}
            fingerprint.remember(shard, known, sources[shard.path])
        else:  # a tensor whose place the patch's took was not read
            before.update(fingerprint.digests([shard]))
    return fingerprint.combine({entry: before[entry] for shard in base.shards for entry in shard.tensors.values()})


def _own_files(base: Checkpoint, plan: Plan, targets: list[TargetFile]) -> dict[str, str]:
    """config.json and the index, where the plan changes what they say."""
    own: dict[str, str] = {}
    if plan.config:
        own["config.json"] = json.dumps({**base.config, **plan.config}, indent=2, ensure_ascii=False) + "\n"
    if plan.reshapes(base) and (base.path / INDEX).is_file():
        tree = read_json_object(base.path / INDEX)
        entries = {t.entry.name: (t.entry, file.path.name) for file in targets for t in file.targets}
        metadata = tree.get("metadata")
        tree["metadata"] = dict(metadata) if isinstance(metadata, dict) else {}
        tree["metadata"]["total_size"] = sum(entry.nbytes for entry, _ in entries.values())
        if "total_parameters" in tree["metadata"]:
            tree["metadata"]["total_parameters"] = sum(math.prod(entry.shape) for entry, _ in entries.values())
        tree["weight_map"] = {name: file for name, (_, file) in sorted(entries.items())}
        own[INDEX] = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    return own


def _write_adapter(
    folder: Path, patch: Patch, base: Checkpoint, old: Old | None, record: PortRecord, on_progress: Progress | None
) -> PortRecord:
    """Write the patch, re-targeted to the base, into `folder`; returns the record with what it lacked."""
    extras = tokenizer_files(patch.path)
    # base weights saved with the patch stay behind: PEFT would put them over the new base's
    names = patch.header.tensors.keys() - patch.left_behind
    meter = Meter(patch.header.size + sum(path.stat().st_size for path in extras.values()), on_progress)
    _check_space(folder, 2 * meter.total)
    files = {name: copy_file(path, _under(folder, name), meter) for name, path in extras.items()}
    config = _retargeted(patch.config, record.base.name, record.scale)
    if patch.init == "plain" or old is None:
        files[WEIGHTS] = write_subset(patch.header, names, folder / WEIGHTS, meter)
    else:
        file, config = converted(patch, old, config, folder / WEIGHTS)
        files[WEIGHTS] = write_files([file], Job({}, meter))[file.path].sha256
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    files[CONFIG] = fingerprint.file_digest(folder / CONFIG)
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


def _known(base: Checkpoint) -> dict[TensorEntry, str]:
    """Digests of the base's tensors, of the files the cache knows."""
    return {
        shard.tensors[name]: digest
        for shard in base.shards
        for name, digest in (fingerprint.cached(shard) or {}).items()
    }


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
