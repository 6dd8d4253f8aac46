"""Bytes of one file copied: shared by the file system where it can, otherwise by the kernel or through memory."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import BinaryIO

from portllm.checkpoint.files.hashing import file_hash
from portllm.checkpoint.files.progress import ByteMeter
from portllm.checkpoint.files.reading import open_input, reading
from portllm.errors import CheckpointError

FICLONE = 0x40049409  # ioctl_ficlone(2)
KERNEL_BYTES = 64 << 20  # copied at a time by the kernel
COPY_BYTES = 1 << 20  # copied at a time through memory


def share_blocks(source: int, target: int) -> bool:
    """Have the open file `target` share the blocks of `source` (btrfs, XFS); return whether the file system did."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:  # not on this file system, or not across two of them
        return False
    return True


def clone(source: Path, target: Path) -> bool:
    """Make `target` share the bytes of `source`; return whether the file system did."""
    with open_input(source) as old, target.open("wb") as new:
        return share_blocks(old.fileno(), new.fileno())


def copy_bytes(source: Path, target: Path, meter: ByteMeter) -> None:
    """Copy one file's bytes, following links. Raises CheckpointError when it becomes shorter meanwhile, OSError."""
    with open_input(source) as old, target.open("wb", buffering=0) as new:
        left = os.fstat(old.fileno()).st_size
        while left:
            count = _copy_some(old.fileno(), new.fileno())
            if count == 0:
                raise CheckpointError(f"{source}: became shorter while it was copied; leave inputs alone and try again")
            left -= count
            meter.add(count)


def copy_and_hash(source: Path, target: Path, meter: ByteMeter) -> str:
    """Copy one file's bytes, following links, and return their BLAKE3."""
    digest = file_hash("blake3")
    buffer = memoryview(bytearray(COPY_BYTES))
    with open_input(source) as file, target.open("wb") as writing:
        while count := _read_some(file, buffer, source):
            digest.update(buffer[:count])
            writing.write(buffer[:count])
            meter.add(count)
    return digest.hexdigest()


def _read_some(file: BinaryIO, buffer: memoryview, path: Path) -> int:
    with reading(path):
        return os.readv(file.fileno(), [buffer])


def _copy_some(old: int, new: int) -> int:
    """Copy some bytes by the kernel, or through memory where it cannot: across some file systems."""
    try:
        return os.copy_file_range(old, new, KERNEL_BYTES)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return os.write(new, os.read(old, COPY_BYTES))
