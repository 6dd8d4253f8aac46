"""Digests: of a tensor, of a file, and the fingerprint of a checkpoint or patch (names, dtypes, shapes and bytes).

A fingerprint is BLAKE3 over one line per tensor in sorted order, each with the BLAKE3 of the tensor's bytes, so it does
not depend on sharding, on the order in a file, or on metadata. Digests of tensors are cached per file in the user's
cache directory, under the file's identity (device, inode, size, mtime and ctime in ns).

BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020) is meant to be as strong as SHA-256 and is four times as fast.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

from blake3 import blake3

from portllm.checkpoint.files.headers import Header, read_headers
from portllm.checkpoint.files.output import staged_file
from portllm.checkpoint.files.reading import open_input, read_exactly
from portllm.checkpoint.files.tensors import TensorEntry
from portllm.errors import OutputError

PIECE_BYTES = 1 << 20
SETTLED_NS = 2_000_000_000  # a file younger than this could change again within one tick of its clock
Algorithm = Literal["blake3", "sha256"]  # of a file's digest
KIND = "blake3"  # of the digests in the cache: others are ignored


class Hash(Protocol):
    """A running hash of bytes, as hashlib and blake3 give it."""

    def update(self, data: memoryview, /) -> object:
        """Add the next bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far, in hex."""


def fingerprint(path: Path) -> str:
    """Return the hex digest of the tensors of a checkpoint or patch directory. Raises CheckpointError."""
    return combine(digests(read_headers(path)))


def digests(files: Iterable[Header], *, fresh: bool = False) -> dict[TensorEntry, str]:
    """Return the BLAKE3 of every tensor's bytes, from the cache where the file is unchanged.

    `fresh` ignores the cache. Raises CheckpointError.
    """
    digests: dict[TensorEntry, str] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for shard in files:
            by_name = (None if fresh else cached(shard)) or _file_digests(shard, pool)
            digests.update({entry: by_name[name] for name, entry in shard.tensors.items()})
    return digests


def tensor_hash() -> blake3:
    """Return a new hash for the bytes of a tensor."""
    return blake3()


def combine(tensors: Mapping[TensorEntry, str]) -> str:
    """Return the fingerprint made of the digests of single tensors."""
    total = blake3(b"portllm fingerprint 2\n")
    for entry in sorted(tensors, key=lambda e: e.name):
        line = json.dumps([entry.name, entry.dtype, list(entry.shape), tensors[entry]])
        total.update(line.encode() + b"\n")
    return str(total.hexdigest())


def file_hash(algorithm: Algorithm) -> Hash:
    """Return a new hash of that kind, for the bytes of a file."""
    return hashlib.sha256() if algorithm == "sha256" else blake3()


def file_digest(path: Path, algorithm: Algorithm = "sha256") -> str:
    """Return the digest of a complete file, in hex."""
    total, buffer = file_hash(algorithm), memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total.update(buffer[:count])
    return total.hexdigest()


def cached(shard: Header) -> dict[str, str] | None:
    """Return the cached digests of a file's tensors, None when the cache has none of this file in this state."""
    try:
        tree = json.loads(_cache_file(shard.path).read_text(encoding="utf-8"))
        known = tree["tensors"]
        if (tree["kind"], tree["identity"]) == (KIND, identity(shard.path.stat())) and set(known) == set(shard.tensors):
            return {str(name): _hex(value) for name, value in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        pass  # absent, broken or written by others
    return None


def remember(shard: Header, known: Mapping[str, str], was: list[int]) -> None:
    """Cache the digests of a file's tensors, unless its identity is no longer `was` or it was written just now."""
    text = json.dumps({"kind": KIND, "identity": was, "tensors": dict(known)})
    try:
        if identity(shard.path.stat()) != was or time.time_ns() - max(was[-2:]) < SETTLED_NS:
            return
        with staged_file(_cache_file(shard.path)) as partial:
            partial.write_text(text, encoding="utf-8")
    except (OSError, OutputError, RuntimeError):
        pass  # a cache that cannot be written costs time, not correctness


def _file_digests(shard: Header, pool: Executor) -> dict[str, str]:
    with open_input(shard.path) as file:
        was = identity(os.fstat(file.fileno()))
        entries = shard.tensors.values()
        hashed = pool.map(lambda entry: _tensor_digest(file.fileno(), entry), entries)
        known = dict(zip(shard.tensors, hashed, strict=True))
    remember(shard, known, was)
    return known


def _tensor_digest(handle: int, entry: TensorEntry) -> str:
    total = tensor_hash()
    buffer = memoryview(bytearray(min(PIECE_BYTES, entry.nbytes)))
    for at in range(entry.start, entry.stop, PIECE_BYTES):
        piece = buffer[: entry.stop - at]
        read_exactly(handle, piece, at, entry.path)
        total.update(piece)
    return str(total.hexdigest())


def identity(stat: os.stat_result) -> list[int]:
    """Return the values that distinguish one state of a file from every other."""
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _cache_file(path: Path) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return Path(root) / "portllm" / "fingerprints" / f"{key}.json"


def _hex(value: str) -> str:
    if len(bytes.fromhex(value)) != 32:
        raise ValueError(value)
    return value
