"""What a port writes: the base's files with the patch in the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import Base
from portllm.checkpoint.files.copying import copy_and_hash
from portllm.checkpoint.files.hashing import cached, combine, digests, file_digest, remember
from portllm.checkpoint.files.names import CONFIG, INDEX, companions
from portllm.checkpoint.files.output import check_room
from portllm.checkpoint.files.progress import ByteMeter, Progress
from portllm.checkpoint.files.reading import read_json_object
from portllm.checkpoint.files.tensors import TensorEntry
from portllm.checkpoint.planning.changes import Plan
from portllm.checkpoint.writing.targets import TargetFile, target_files
from portllm.checkpoint.writing.writer import Job, Written, write_files


@dataclass(frozen=True)
class Ported:
    """What was written: BLAKE3 by file name, fingerprints of the base and of the result, tensors changed and copied."""

    files: Mapping[str, str]
    base_fingerprint: str
    fingerprint: str
    tensors: Mapping[str, int]


def write_merged(folder: Path, patch: Patch, base: Base, plan: Plan, on_progress: Progress | None = None) -> Ported:
    """Write the base's files into `folder`, the patch merged into the weights by `plan`.

    Raises PatchError, CheckpointError, OutputError and OSError.
    """
    targets = target_files(plan, base, folder)
    texts = _changed_texts(base, plan, targets)
    copies = {name: path for name, path in companions(base.path, patch.path).items() if name not in texts}
    if (index := base.path / INDEX).is_file() and INDEX not in texts:
        copies[INDEX] = index
    total = sum(file.nbytes for file in targets) + sum(path.stat().st_size for path in copies.values())
    meter = ByteMeter(total, on_progress)
    check_room(folder, meter.total, "the ported files need")
    files = {name: copy_and_hash(path, under(folder, name), meter) for name, path in copies.items()}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        files[name] = file_digest(folder / name, "blake3")
    written = write_files(targets, Job(_cached_digests(base), meter))
    files.update({path.name: result.digest for path, result in written.items()})
    after = {entry: digest for result in written.values() for entry, digest in result.after.items()}
    return Ported(files, _base_fingerprint(base, written), combine(after), plan.tensors(base))


def under(folder: Path, name: str) -> Path:
    """Return `folder`/`name` and create its directories."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _base_fingerprint(base: Base, written: Mapping[Path, Written]) -> str:
    """Return the base's fingerprint from the digests taken while its tensors were read, and cache those digests."""
    before = {entry: digest for result in written.values() for entry, digest in result.before.items()}
    sources = {path: state for result in written.values() for path, state in result.sources.items()}
    for shard in base.checkpoint.shards:
        if shard.path in sources and all(entry in before for entry in shard.tensors.values()):
            remember(shard, {name: before[entry] for name, entry in shard.tensors.items()}, sources[shard.path])
        else:  # a tensor that the patch's replaced was not read
            before.update(digests([shard]))
    return combine({entry: before[entry] for entry in base.tensors.values()})


def _changed_texts(base: Base, plan: Plan, targets: list[TargetFile]) -> dict[str, str]:
    """Return config.json and the index, where the plan changes them."""
    texts: dict[str, str] = {}
    if plan.config:
        texts[CONFIG] = json.dumps({**base.config, **plan.config}, indent=2, ensure_ascii=False) + "\n"
    if plan.reshapes(base) and (base.path / INDEX).is_file():
        tree = read_json_object(base.path / INDEX)
        entries = {t.entry.name: t.entry for file in targets for t in file.targets}
        metadata = tree.get("metadata")
        tree["metadata"] = dict(metadata) if isinstance(metadata, dict) else {}
        tree["metadata"]["total_size"] = sum(entry.nbytes for entry in entries.values())
        if "total_parameters" in tree["metadata"]:
            tree["metadata"]["total_parameters"] = sum(math.prod(entry.shape) for entry in entries.values())
        tree["weight_map"] = {name: entry.path.name for name, entry in sorted(entries.items())}
        texts[INDEX] = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    return texts


def _cached_digests(base: Base) -> dict[TensorEntry, str]:
    """Return the cached digests of the base's tensors."""
    return {
        shard.tensors[name]: digest
        for shard in base.checkpoint.shards
        for name, digest in (cached(shard) or {}).items()
    }
