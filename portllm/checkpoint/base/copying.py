"""A complete checkpoint copied into a directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.files.copying import clone, copy_bytes
from portllm.checkpoint.files.names import INDEX, companions
from portllm.checkpoint.files.output import check_room
from portllm.checkpoint.files.progress import ByteMeter, Progress


def copy_checkpoint(source: Path, folder: Path, on_progress: Progress | None = None) -> None:
    """Copy config, weights, index and companions of `source` into `folder`; links are followed.

    Raises CheckpointError when the source is incomplete, OutputError for lack of room, OSError.
    """
    base = Checkpoint.open(source)
    files = {shard.path.name: shard.path for shard in base.shards}
    files |= {name: source / name for name in (INDEX,) if (source / name).is_file()}
    files |= companions(source, source)
    meter = ByteMeter(sum(path.stat().st_size for path in files.values()), on_progress)
    for name, path in sorted(files.items()):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        if clone(path, target):
            meter.add(size)
        else:
            check_room(folder, size, "the next file needs")
            copy_bytes(path, target, meter)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the files of `source` that are not weights, config.json included, over those in `folder`."""
    for name, path in companions(source, source).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
