"""A planned port carried out; as an adapter it is the patch, re-targeted to the new base."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import Base
from portllm.checkpoint.files.copying import copy_and_hash
from portllm.checkpoint.files.hashing import file_digest, fingerprint
from portllm.checkpoint.files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, tokenizer_files
from portllm.checkpoint.files.output import check_room
from portllm.checkpoint.files.progress import ByteMeter, Progress
from portllm.checkpoint.planning.changes import Plan
from portllm.checkpoint.planning.initialisation import derived
from portllm.checkpoint.planning.low_rank import LowRank
from portllm.checkpoint.record.records import PortRecord
from portllm.checkpoint.writing.ported import Ported, under, write_merged
from portllm.checkpoint.writing.targets import Target, TargetFile, laid_out, new_entry
from portllm.checkpoint.writing.writer import Job, write_files, write_subset

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit


def write_port(
    folder: Path, patch: Patch, base: Base, plan: Plan, record: PortRecord, *, old: Base | None = None,
    on_progress: Progress | None = None,
) -> PortRecord:  # fmt: skip
    """Write what `record` names into `folder`, a merged checkpoint or a re-targeted patch; return the record with it.

    Raises as `write_merged` and `write_adapter`.
    """
    if record.output == "merged":
        ported = write_merged(folder, patch, base, plan, on_progress)
    else:
        ported = write_adapter(
            folder, patch, base, old, name=record.base.name, scale=record.scale, on_progress=on_progress
        )
    return record.completed(**dataclasses.asdict(ported))


def write_adapter(
    folder: Path, patch: Patch, base: Base, old: Base | None, *, name: str, scale: float,
    on_progress: Progress | None = None,
) -> Ported:  # fmt: skip
    """Write the patch into `folder` for the base called `name`, Δ multiplied by `scale`; PiSSA, OLoRA as plain LoRA.

    Raises PatchError, CheckpointError, OutputError and OSError.
    """
    copies = tokenizer_files(patch.path)
    # base weights saved with the patch are left out: PEFT would put them over the new base's
    names = patch.header.tensors.keys() - patch.left_behind
    meter = ByteMeter(patch.header.size + sum(path.stat().st_size for path in copies.values()), on_progress)
    check_room(folder, 2 * meter.total, "the ported files need")
    files = {copy: copy_and_hash(path, under(folder, copy), meter) for copy, path in copies.items()}
    config = _retargeted(patch.config, name, scale)
    if patch.init == "plain" or old is None:
        files[ADAPTER_WEIGHTS] = write_subset(patch.header, names, folder / ADAPTER_WEIGHTS, meter)
    else:
        file, config = converted(patch, old, config, folder / ADAPTER_WEIGHTS)
        files[ADAPTER_WEIGHTS] = write_files([file], Job({}, meter))[file.path].digest
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    files[ADAPTER_CONFIG] = file_digest(folder / ADAPTER_CONFIG, "blake3")
    return Ported(files, fingerprint(base.path), fingerprint(folder), {"changed": 0, "copied": len(names)})


def adapter_file(patch: Patch, old: Base | None, folder: Path) -> TargetFile:
    """Return the weights that `write_adapter` writes into `folder`: the patch's own, but for copies of base weights."""
    if patch.init != "plain" and old is not None:
        return converted(patch, old, patch.config, folder / ADAPTER_WEIGHTS)[0]
    kept = (entry for name, entry in patch.header.tensors.items() if name not in patch.left_behind)
    return TargetFile(folder / ADAPTER_WEIGHTS, b"", tuple(Target(entry, entry) for entry in kept))


def _retargeted(config: Mapping[str, Any], name: str, scale: float) -> dict[str, Any]:
    tree = {**config, "base_model_name_or_path": name, "revision": None}
    if scale != 1.0:
        alphas = config.get("alpha_pattern") or {}
        tree["alpha_pattern"] = {key: alpha * scale for key, alpha in alphas.items()}
        if config.get("lora_alpha") is not None:  # it may be left out where a pattern covers every module
            tree["lora_alpha"] = config["lora_alpha"] * scale
    return tree


def converted(patch: Patch, old: Base, config: Mapping[str, Any], path: Path) -> tuple[TargetFile, dict[str, Any]]:
    """Return (the patch as plain LoRA of twice the rank in fp32, for `path`; its config), scaling unchanged."""
    targets = []
    for module, pair in patch.modules.items():
        update = derived(module, pair, patch, old, 1.0)
        shapes = (2 * pair.rank, pair.shape[1]), (pair.shape[0], 2 * pair.rank)
        for side, (entry, shape) in enumerate(zip((pair.a_entry, pair.b_entry), shapes, strict=True)):
            targets.append(Target(new_entry(entry.name, "F32", shape), None, partial(_factor, update, side)))
    tree = {**config, "init_lora_weights": True, "r": 2 * config["r"]}
    growth = math.sqrt(2) if config.get("use_rslora") else 2
    tree["lora_alpha"] = growth * config["lora_alpha"]
    tree["rank_pattern"] = {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()}
    tree["alpha_pattern"] = {key: growth * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()}
    return laid_out(targets, patch.header.metadata, path), tree


def _factor(update: LowRank, side: int) -> Edit:
    import torch

    from portllm.algebra.edits import Replace

    factor = torch.as_tensor(update.factors()[side]).contiguous()
    return Replace(lambda row, count: factor[row : row + count] if count >= 0 else factor)
