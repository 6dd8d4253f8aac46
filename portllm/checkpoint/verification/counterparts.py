"""The files of a ported directory that are not weights, and their counterparts in base and patch.

Each is a copy of one of theirs, or what the port must have made of it; all raise VerificationError where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portllm.checkpoint.adapter.config import short
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import Base
from portllm.checkpoint.files.hashing import file_digest, fingerprint
from portllm.checkpoint.files.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    CONFIG,
    INDEX,
    companions,
    tokenizer_files,
)
from portllm.checkpoint.files.progress import ByteMeter
from portllm.checkpoint.files.reading import read_json_object
from portllm.checkpoint.planning.changes import Plan
from portllm.checkpoint.record import provenance
from portllm.checkpoint.record.records import PortRecord
from portllm.checkpoint.verification.manifest import Manifest
from portllm.errors import VerificationError
from portllm.params import PortParams

# what re-targeting a patch changes, and what turning it into plain LoRA of twice the rank changes besides
RETARGETED = frozenset({"base_model_name_or_path", "revision", "lora_alpha", "alpha_pattern"})
CONVERTED = frozenset({"init_lora_weights", "r", "rank_pattern"})


def made_before(out: Path, *, patch: Path, onto: Path, source: Path | None, params: PortParams) -> PortRecord | None:
    """Return port.json's record where `out` is, complete and unchanged, what this port makes.

    None where there is no such directory or anything that it was made of differs. Raises CheckpointError,
    UnsafeFileError or VerificationError where it is that port and was changed or damaged since.
    """
    if not (out / PortRecord.FILE).is_file():
        return None
    manifest = Manifest.open(out)
    record = manifest.record
    asked = (params.as_, params.scale, params.method, *provenance.versions(*provenance.COMPUTING).items())
    if asked != (record.output, record.scale, record.method, *record.versions.items()):
        return None
    if record.configs != provenance.configs(onto, patch, record.algorithm):
        return None
    known = {patch: record.patch.fingerprint, onto: record.base.fingerprint}
    if source is not None:
        known[source] = record.trained_on.fingerprint if record.trained_on is not None else None
    if any(fingerprint(path) != mark for path, mark in known.items()):
        return None
    copies = companions(onto, patch) if record.output == "merged" else tokenizer_files(patch)
    copies.pop(CONFIG, None)  # `configs` has it
    if any(record.files.get(n) != file_digest(p, record.algorithm) for n, p in copies.items()):
        return None
    manifest.check_names()
    manifest.check_digests(ByteMeter(manifest.nbytes))
    return record


def check_config(manifest: Manifest, name: str, folder: Path) -> None:
    """Prove that the config `name` of base or patch is the one the port read, where it recorded that."""
    record = manifest.record
    expected, found = record.configs.get(name), file_digest(folder / name, record.algorithm)
    if expected not in (None, found):
        raise VerificationError(
            f"{folder / name}: has {record.algorithm_name} {found[:12]}, {manifest.folder / PortRecord.FILE} was made "
            f"with {str(expected)[:12]}; pass the one it was made with, or port again"
        )


def check_merged_files(manifest: Manifest, base: Base, patch: Patch, plan: Plan) -> None:
    """Prove that config, tokenizer and all other files are the base's or the patch's, changed only where planned."""
    copies = companions(base.path, patch.path)
    if (base.path / INDEX).is_file():
        copies[INDEX] = base.path / INDEX
    made = {CARD, *(shard.path.name for shard in base.checkpoint.shards)}
    if plan.config:
        made.add(CONFIG)
        expected = {**base.config, **plan.config}
        _same_config(manifest.folder / CONFIG, expected, frozenset())
    if plan.reshapes(base):
        made.add(INDEX)  # that it names the tensors where they are was checked as it was read
    _check_copies(manifest, copies, made)


def check_adapter_files(manifest: Manifest, patch: Patch) -> None:
    """Prove that the tokenizer is the patch's, and the config too but for the base's name and the scale."""
    _check_copies(manifest, tokenizer_files(patch.path), {CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS})
    path = manifest.folder / ADAPTER_CONFIG
    _same_config(path, patch.config, RETARGETED if patch.init == "plain" else RETARGETED | CONVERTED)
    written = Patch.open(manifest.folder)
    if patch.init == "plain":
        found, before = _alphas(written.config), _alphas(patch.config)
        expected = {key: alpha * manifest.record.scale for key, alpha in before.items()}
    else:  # twice the rank: what counts is alpha over rank
        found, expected = _scalings(written, 1.0), _scalings(patch, manifest.record.scale)
    for key in sorted(found.keys() | expected.keys()):
        one, other = found.get(key, math.nan), expected.get(key, math.nan)
        if not math.isclose(one, other, rel_tol=1e-12):
            raise _wrong(path, f"{key} is scaled by {one:g}, expected {other:g}")


def _alphas(config: Mapping[str, Any]) -> dict[str, float]:
    alphas = {"lora_alpha": config["lora_alpha"]} if config.get("lora_alpha") is not None else {}
    return {**alphas, **{f"alpha_pattern of {key}": a for key, a in (config.get("alpha_pattern") or {}).items()}}


def _scalings(patch: Patch, scale: float) -> dict[str, float]:
    return {module: pair.scaling * scale for module, pair in patch.modules.items()}


def _check_copies(manifest: Manifest, copies: Mapping[str, Path], made: set[str]) -> None:
    recorded, algorithm = manifest.record.files, manifest.record.algorithm
    for name, source in copies.items():
        if name not in made and recorded.get(name) != file_digest(source, algorithm):
            raise _wrong(manifest.folder / name, f"expected a copy of {source}, found another file or none")
    if strangers := sorted(recorded.keys() - copies.keys() - made):
        raise _wrong(manifest.folder / PortRecord.FILE, f"names {strangers[0]}, which is neither base's nor patch's")


def _same_config(path: Path, expected: Mapping[str, Any], free: frozenset[str]) -> None:
    found = read_json_object(path)
    for key in sorted((found.keys() | expected.keys()) - free):
        if found.get(key) != expected.get(key):
            raise _wrong(path, f"{key} is {short(found.get(key))}, expected {short(expected.get(key))}")


def _wrong(path: Path, what: str) -> VerificationError:
    return VerificationError(f"{path}: {what}; it is not what base and patch make, port again")
