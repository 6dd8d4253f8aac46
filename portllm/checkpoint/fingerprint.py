"""One hex digest of what a checkpoint or patch computes with: names, dtypes, shapes and bytes of its tensors.

The digest is SHA-256 over one line per tensor in sorted order, each with the SHA-256 of the tensor's bytes; so it
does not depend on sharding, on the order in a file, or on metadata. Digests of tensors are kept per file in the
user's cache directory, under the file's identity (device, inode, size, mtime and ctime in ns).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from portllm.checkpoint.headers import Header, TensorEntry, read_header
from portllm.checkpoint.output import staged_file
from portllm.checkpoint.reader import read_exactly, shard_names

PIECE_BYTES = 1 << 20
SETTLED_NS = 2_000_000_000  # a file younger than this could change again within one tick of its clock
ADAPTER = "adapter_model.safetensors"


def fingerprint(path: Path) -> str:
    """Hex digest of the tensors below `path`, a checkpoint or a patch directory. Raises CheckpointError."""
    return combine(digests(headers(path)))


def headers(path: Path) -> list[Header]:
    """The safetensors headers of a checkpoint or patch directory. Raises CheckpointError."""
    names = [ADAPTER] if (path / ADAPTER).is_file() else shard_names(path)
    return [read_header(path / name) for name in names]


def digests(files: Iterable[Header], *, fresh: bool = False) -> dict[TensorEntry, str]:
    """SHA-256 of every tensor's bytes, from the cache where the file is unchanged (`fresh`: always from the bytes).

    Raises CheckpointError.
    """
    shards = list(files)
    found: dict[TensorEntry, str] = {}
    with ThreadPoolExecutor(max_workers=min(len(shards), os.cpu_count() or 1) or 1) as pool:
        for shard, known in zip(shards, pool.map(lambda s: _file_digests(s, fresh), shards), strict=True):
            found.update({entry: known[name] for name, entry in shard.tensors.items()})
    return found


def combine(tensors: Mapping[TensorEntry, str]) -> str:
    """The fingerprint made of the digests of single tensors."""
    total = hashlib.sha256(b"portllm fingerprint 1\n")
    for entry in sorted(tensors, key=lambda e: e.name):
        line = json.dumps([entry.name, entry.dtype, list(entry.shape), tensors[entry]])
        total.update(line.encode() + b"\n")
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached(shard: Header) -> dict[str, str] | None:
    """Digests of a file's tensors as the cache knows them, or None when it does not know this very file."""
    try:
        tree = json.loads(_cache_file(shard.path).read_text(encoding="utf-8"))
        known = tree["tensors"]
        if tree["identity"] == identity(shard.path.stat()) and set(known) == set(shard.tensors):
            return {str(name): _hex(value) for name, value in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # absent, broken or not ours: as good as no cache
    return None


def remember(shard: Header, known: Mapping[str, str], was: list[int]) -> None:
    """Keep the digests of a file's tensors, unless the file is not what it `was` before or is still fresh."""
    text = json.dumps({"identity": was, "tensors": dict(known)})
    try:
        if identity(shard.path.stat()) != was or time.time_ns() - max(was[-2:]) < SETTLED_NS:
            return
        with staged_file(_cache_file(shard.path)) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError:
        pass  # a cache that cannot be written costs time, not correctness


def _file_digests(shard: Header, fresh: bool) -> dict[str, str]:
    known = None if fresh else cached(shard)
    if known is not None:
        return known
    buffer = memoryview(bytearray(PIECE_BYTES))
    with shard.path.open("rb", buffering=0) as file:
        was = identity(os.fstat(file.fileno()))
        known = {name: _tensor_digest(file.fileno(), e, buffer, shard.path) for name, e in shard.tensors.items()}
    remember(shard, known, was)
    return known


def _tensor_digest(handle: int, entry: TensorEntry, buffer: memoryview, path: Path) -> str:
    total = hashlib.sha256()
    for at in range(entry.start, entry.stop, len(buffer)):
        piece = buffer[: min(len(buffer), entry.stop - at)]
        read_exactly(handle, piece, at, path)
        total.update(piece)
    return total.hexdigest()


def identity(stat: os.stat_result) -> list[int]:
    """What tells one state of a file from every other."""
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _cache_file(path: Path) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return Path(root) / "portllm" / "fingerprints" / f"{key}.json"


def _hex(value: str) -> str:
    if len(bytes.fromhex(value)) != 32:
        raise ValueError(value)
    return value
