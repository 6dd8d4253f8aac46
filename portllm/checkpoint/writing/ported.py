"""A patch merged into a checkpoint on disk, and everything else of the checkpoint beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.checkpoint import INDEX, Checkpoint, read_json_object
from portllm.checkpoint.files import hashing as fingerprint
from portllm.checkpoint.files.headers import TensorEntry
from portllm.checkpoint.files.names import companions
from portllm.checkpoint.files.output import check_room
from portllm.checkpoint.planning.changes import Plan
from portllm.checkpoint.writing.placing import nbytes
from portllm.checkpoint.writing.targets import TargetFile
from portllm.checkpoint.writing.writer import Job, Meter, Written, copy_file, write_files

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Merged:
    """What was written: BLAKE3 by file, and the fingerprints of the base and of what became of it."""

    files: Mapping[str, str]
    base_fingerprint: str
    fingerprint: str


def write_merged(
    folder: Path, patch: Patch, base: Checkpoint, plan: Plan, on_progress: Progress | None = None
) -> Merged:
    """Write the base's files into `folder`, the patch in the weights as `plan` says.

    `on_progress(bytes done, bytes in all)`. Raises PatchError, CheckpointError, OutputError and OSError.
    """
    targets = plan.files(base, folder)
    own = _own_files(base, plan, targets)
    extras = {name: path for name, path in companions(base.path, patch.path).items() if name not in own}
    if (index := base.path / INDEX).is_file() and INDEX not in own:
        extras[INDEX] = index
    meter = Meter(sum(map(nbytes, targets)) + sum(path.stat().st_size for path in extras.values()), on_progress)
    check_room(folder, meter.total, "the ported files need")
    files = {name: copy_file(path, under(folder, name), meter) for name, path in extras.items()}
    for name, text in own.items():
        (folder / name).write_text(text, encoding="utf-8")
        files[name] = fingerprint.file_digest(folder / name, "blake3")
    written = write_files(targets, Job(_known(base), meter))
    files.update({path.name: result.digest for path, result in written.items()})
    after = {entry: digest for result in written.values() for entry, digest in result.after.items()}
    return Merged(files, _base_fingerprint(base, written), fingerprint.combine(after))


def under(folder: Path, name: str) -> Path:
    """`folder`/`name`, its directories made."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


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


def _known(base: Checkpoint) -> dict[TensorEntry, str]:
    """Digests of the base's tensors, of the files the cache knows."""
    return {
        shard.tensors[name]: digest
        for shard in base.shards
        for name, digest in (fingerprint.cached(shard) or {}).items()
    }
