"""A whole checkpoint copied: the file system shares the bytes where it can, else the kernel copies them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from portllm.checkpoint.base.checkpoint import INDEX, Checkpoint
from portllm.checkpoint.files.headers import open_input
from portllm.checkpoint.files.names import companions
from portllm.checkpoint.files.output import check_room
from portllm.checkpoint.writing.stream import FICLONE
from portllm.checkpoint.writing.writer import Meter
from portllm.errors import CheckpointError

PIECE_BYTES = 64 << 20

Progress = Callable[[int, int], None]


def copy_checkpoint(source: Path, folder: Path, on_progress: Progress | None = None) -> None:
    """Copy config, weights, index and companions of `source` into `folder`; links are followed.

    `on_progress(bytes done, bytes in all)`. Raises CheckpointError when the source is not whole, OutputError for lack
    of room, OSError.
    """
    base = Checkpoint.open(source)
    files = {shard.path.name: shard.path for shard in base.shards}
    files |= {name: source / name for name in (INDEX,) if (source / name).is_file()}
    files |= companions(source, source)
    meter = Meter(sum(path.stat().st_size for path in files.values()), on_progress)
    for name, path in sorted(files.items()):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        if _cloned(path, target):
            meter.add(size)
        else:
            check_room(folder, size, "the next file needs")
            _copy(path, target, meter)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what stands beside the weights of `source`, config.json among it, over what is in `folder`."""
    for name, path in companions(source, source).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def _cloned(source: Path, target: Path) -> bool:
    """Whether the file system (btrfs, XFS) let `target` share the bytes of `source`."""
    with open_input(source) as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
        except OSError:
            return False
    return True


def _copy(source: Path, target: Path, meter: Meter) -> None:
    with open_input(source) as old, target.open("wb", buffering=0) as new:
        left = os.fstat(old.fileno()).st_size
        while left:
            count = _piece(old.fileno(), new.fileno())
            if count == 0:
                raise CheckpointError(f"{source}: became shorter while it was copied; leave inputs alone and try again")
            left -= count
            meter.add(count)


def _piece(old: int, new: int) -> int:
    """Bytes copied by the kernel, or through memory where it cannot: across some file systems."""
    try:
        return os.copy_file_range(old, new, PIECE_BYTES)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return os.write(new, os.read(old, 1 << 20))
