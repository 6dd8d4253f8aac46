"""The files of a ported directory that are not weights, and their counterparts in base and patch.

Each file is a copy of its counterpart, or the file that the port makes from it. Each check raises VerificationError
where it is not.
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

# config keys that re-targeting a patch changes, and those that conversion to plain LoRA of twice the rank also changes
RETARGETED = frozenset({"base_model_name_or_path", "revision", "lora_alpha", "alpha_pattern"})
CONVERTED = frozenset({"init_lora_weights", "r", "rank_pattern"})


def made_before(out: Path, *, patch: Path, onto: Path, source: Path | None, params: PortParams) -> PortRecord | None:
    """Return port.json's record where `out` is the result of this port, complete and unchanged.

    Returns None where `out` has no record, or an input or parameter of the port differs. Raises CheckpointError,
    UnsafeFileError or VerificationError where `out` is the result of this port and was changed or damaged later.
    """
    if not (out / PortRecord.FILE).is_file():
        return None
    manifest = Manifest.open(out)
    record = manifest.record
    settings = (params.as_, params.scale, params.method, *provenance.versions(*provenance.COMPUTING).items())
    if settings != (record.output, record.scale, record.method, *record.versions.items()):
        return None
    if record.configs != provenance.configs(onto, patch, record.algorithm):
        return None
    fingerprints = {patch: record.patch.fingerprint, onto: record.base.fingerprint}
    if source is not None:
        fingerprints[source] = record.trained_on.fingerprint if record.trained_on is not None else None
    if any(fingerprint(path) != expected for path, expected in fingerprints.items()):
        return None
    copies = companions(onto, patch) if record.output == "merged" else tokenizer_files(patch)
    copies.pop(CONFIG, None)  # `configs` contains its digest
    if any(record.files.get(n) != file_digest(p, record.algorithm) for n, p in copies.items()):
        return None
    manifest.check_names()
    manifest.check_digests(ByteMeter(manifest.nbytes))
    return record


def check_config(manifest: Manifest, name: str, folder: Path) -> None:
    """Prove that the config `name` of base or patch is the one that the port read, where port.json has its digest."""
    record = manifest.record
    expected, actual = record.configs.get(name), file_digest(folder / name, record.algorithm)
    if expected not in (None, actual):
        raise VerificationError(
            f"{folder / name}: has {record.algorithm_name} {actual[:12]}, {manifest.folder / PortRecord.FILE} was made "
            f"with {str(expected)[:12]}; pass the one it was made with, or port again"
        )


def check_merged_files(manifest: Manifest, base: Base, patch: Patch, plan: Plan) -> None:
    """Prove that config, tokenizer and all other files are the base's or the patch's, changed only where planned."""
    copies = companions(base.path, patch.path)
    if (base.path / INDEX).is_file():
        copies[INDEX] = base.path / INDEX
    written = {CARD, *(shard.path.name for shard in base.checkpoint.shards)}
    if plan.config:
        written.add(CONFIG)
        expected = {**base.config, **plan.config}
        _same_config(manifest.folder / CONFIG, expected, frozenset())
    if plan.reshapes(base):
        written.add(INDEX)  # reading it verified that it names the file of each tensor
    _check_copies(manifest, copies, written)


def check_adapter_files(manifest: Manifest, patch: Patch) -> None:
    """Prove that tokenizer and config are the patch's, except for the base's name and the scale in the config."""
    _check_copies(manifest, tokenizer_files(patch.path), {CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS})
    path = manifest.folder / ADAPTER_CONFIG
    _same_config(path, patch.config, RETARGETED if patch.init == "plain" else RETARGETED | CONVERTED)
    written = Patch.open(manifest.folder)
    if patch.init == "plain":
        scales, trained = _alphas(written.config), _alphas(patch.config)
        expected = {key: alpha * manifest.record.scale for key, alpha in trained.items()}
    else:  # twice the rank: only alpha over rank is comparable
        scales, expected = _scalings(written, 1.0), _scalings(patch, manifest.record.scale)
    for key in sorted(scales.keys() | expected.keys()):
        actual, wanted = scales.get(key, math.nan), expected.get(key, math.nan)
        if not math.isclose(actual, wanted, rel_tol=1e-12):
            raise _wrong(path, f"{key} is scaled by {actual:g}, expected {wanted:g}")


def _alphas(config: Mapping[str, Any]) -> dict[str, float]:
    alphas = {"lora_alpha": config["lora_alpha"]} if config.get("lora_alpha") is not None else {}
    return {**alphas, **{f"alpha_pattern of {key}": a for key, a in (config.get("alpha_pattern") or {}).items()}}


def _scalings(patch: Patch, scale: float) -> dict[str, float]:
    return {module: pair.scaling * scale for module, pair in patch.modules.items()}


def _check_copies(manifest: Manifest, copies: Mapping[str, Path], written: set[str]) -> None:
    """Prove that every file is a copy of its counterpart; `written` names those that the port makes."""
    recorded, algorithm = manifest.record.files, manifest.record.algorithm
    for name, source in copies.items():
        if name not in written and recorded.get(name) != file_digest(source, algorithm):
            raise _wrong(manifest.folder / name, f"expected a copy of {source}, found another file or none")
    if extra := sorted(recorded.keys() - copies.keys() - written):
        raise _wrong(manifest.folder / PortRecord.FILE, f"names {extra[0]}, which is neither base's nor patch's")


def _same_config(path: Path, expected: Mapping[str, Any], free: frozenset[str]) -> None:
    config = read_json_object(path)
    for key in sorted((config.keys() | expected.keys()) - free):
        if config.get(key) != expected.get(key):
            raise _wrong(path, f"{key} is {short(config.get(key))}, expected {short(expected.get(key))}")


def _wrong(path: Path, what: str) -> VerificationError:
    return VerificationError(f"{path}: {what}; it is not what base and patch make, port again")
