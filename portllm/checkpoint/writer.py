"""Writing a ported checkpoint: every shard streamed once, changed tensors in row blocks, the rest copied as bytes.

Memory stays at a few buffers per shard, whatever the model's size. Digests are taken from the bytes as they pass, by a
thread beside the one that computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import struct
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.fingerprint import identity
from portllm.checkpoint.headers import Header, TensorEntry
from portllm.checkpoint.plan import Change
from portllm.checkpoint.reader import TORCH_DTYPES, read_exactly
from portllm.errors import CheckpointError, PatchError

if TYPE_CHECKING:
    from portllm.algebra.lora import Scratch

PIECE_BYTES = 1 << 20
BLOCK_ELEMENTS = 1 << 19  # larger blocks leave the L2 cache, smaller ones pay for the calls
SLOTS = 3  # buffers per shard: one computed, one hashed, one waiting

Progress = Callable[[int, int], None]


class Cancelled(Exception):
    """Another shard failed; this one stopped early."""


class Meter:
    """Bytes written so far, over all shards; calls `on_progress(done, total)` one call at a time."""

    def __init__(self, total: int, on_progress: Progress | None = None) -> None:
        self.total, self.done = total, 0
        self.cancelled = threading.Event()
        self._on_progress, self._lock = on_progress, threading.Lock()

    def add(self, count: int) -> None:
        """Count `count` more bytes. Raises Cancelled when another shard has failed."""
        if self.cancelled.is_set():
            raise Cancelled
        with self._lock:
            self.done += count
            if self._on_progress is not None:
                self._on_progress(self.done, self.total)


@dataclass(frozen=True)
class Job:
    """What all shards of one port share: the changes by tensor name, the scale, and digests known beforehand."""

    changes: Mapping[str, Change]
    scale: float
    known: Mapping[TensorEntry, str]
    meter: Meter


@dataclass
class Written:
    """One written file: its SHA-256, and the SHA-256 of its tensors before and after."""

    sha256: str = ""
    source: list[int] = field(default_factory=list)  # identity of the file it was made from
    before: dict[TensorEntry, str] = field(default_factory=dict)
    after: dict[TensorEntry, str] = field(default_factory=dict)


def write_shards(shards: Mapping[Path, Header], job: Job) -> dict[Path, Written]:
    """Write each header's file, with its changes, to the path it is keyed by; shards in parallel.

    Tensors in `job.known` are not hashed again. Raises PatchError for non-finite values, CheckpointError when an input
    changes under us, OSError.
    """
    workers = max(1, min(len(shards), os.cpu_count() or 1))
    with _torch_for_blocks(), ThreadPoolExecutor(max_workers=workers) as pool:
        futures = {target: pool.submit(_write_shard, shard, target, job) for target, shard in shards.items()}
        try:
            for future in futures.values():
                with contextlib.suppress(Cancelled):
                    future.result()
        finally:
            job.meter.cancelled.set()  # on a failure or Ctrl-C the other shards stop at their next block
    return {target: future.result() for target, future in futures.items()}


def copy_file(source: Path, target: Path, meter: Meter) -> str:
    """Copy one file's bytes (following links) and return their SHA-256."""
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing, _Hashing(0) as hashing:
        size = os.fstat(reading.fileno()).st_size
        _copy(reading.fileno(), writing.fileno(), (0, size), hashing, (), meter, source)
        return hashing.total()


def write_subset(header: Header, names: Container[str], target: Path, meter: Meter) -> str:
    """Write the tensors `names` of a file, in their order, as a safetensors file of its own; returns its SHA-256."""
    kept = [entry for entry in header.tensors.values() if entry.name in names]
    if len(kept) == len(header.tensors):
        return copy_file(header.path, target, meter)
    tree: dict[str, Any] = {"__metadata__": dict(header.metadata)} if header.metadata else {}
    at = 0
    for entry in kept:
        offsets = [at, at + entry.nbytes]
        tree[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.nbytes
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors keeps the data aligned
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE_BYTES))
    with header.path.open("rb", buffering=0) as reading, target.open("wb") as writing:
        head = struct.pack("<Q", len(text)) + text
        digest.update(head)
        writing.write(head)
        for entry in kept:
            for start in range(entry.start, entry.stop, PIECE_BYTES):
                piece = buffer[: min(PIECE_BYTES, entry.stop - start)]
                read_exactly(reading.fileno(), piece, start, header.path)
                digest.update(piece)
                writing.write(piece)
                meter.add(len(piece))
    meter.add(header.size - at)  # what was left out is done too
    return digest.hexdigest()


def _write_shard(shard: Header, target: Path, job: Job) -> Written:
    """One shard from its first byte to its last, synced to the disk."""
    written = Written()
    try:
        with shard.path.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
            stat = os.fstat(reading.fileno())
            written.source = identity(stat)
            with _Hashing(_longest_row(shard, job.changes)) as hashing:
                _write_tensors(reading.fileno(), writing.fileno(), shard, job, hashing, written)
                written.sha256 = hashing.total()
            now = os.fstat(reading.fileno())
            if (now.st_size, now.st_mtime_ns) != (shard.size, stat.st_mtime_ns):
                raise CheckpointError(f"{shard.path}: changed while it was read; leave inputs alone and try again")
            os.fsync(writing.fileno())  # here, so that it overlaps with the other shards' work
    except BaseException:
        job.meter.cancelled.set()
        raise
    return written


def _write_tensors(source: int, out: int, shard: Header, job: Job, hashing: _Hashing, written: Written) -> None:
    scratch: list[Scratch] = []
    _copy(source, out, (0, shard.data_start), hashing, (), job.meter, shard.path)
    for entry in shard.tensors.values():
        before, after = hashlib.sha256(), hashlib.sha256()
        change = job.changes.get(entry.name)
        old = () if entry in job.known else (before,)
        if change is None:
            _copy(source, out, (entry.start, entry.stop), hashing, old, job.meter, shard.path)
        else:
            for at, was, new, slot in _changed(source, shard, change, job.scale, hashing, scratch):
                write_exactly(out, new, at)
                hashing.feed(slot, (was, old), (new, (after,)), (new, (hashing.file,)))
                job.meter.add(len(new))
        hashing.wait()
        written.before[entry] = job.known.get(entry) or before.hexdigest()
        written.after[entry] = after.hexdigest() if change is not None else written.before[entry]


def _changed(
    source: int, shard: Header, change: Change, scale: float, hashing: _Hashing, scratch: list[Scratch]
) -> Iterator[tuple[int, memoryview, memoryview, _Slot]]:
    """(offset, old bytes, new bytes, their slot) of a changed tensor, block of rows by block of rows."""
    import torch

    from portllm.algebra.lora import Scratch, Update

    entry, pair = change.entry, change.pair
    a, b = (pair.b.T, pair.a.T) if change.transposed else (pair.a, pair.b)  # (B A)ᵀ = Aᵀ Bᵀ
    update = Update(a, b, scale * pair.scaling)
    dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
    largest = torch.finfo(dtype).max
    rows, columns = entry.shape
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    if not scratch or scratch[0].elements < step * columns:
        scratch[:] = [Scratch(max(BLOCK_ELEMENTS, step * columns))]
    for row in range(0, rows if columns else 0, step):
        count = min(step, rows - row)
        slot = hashing.slot()
        nbytes = count * columns * dtype.itemsize
        was, new = slot.old[:nbytes], slot.new[:nbytes]
        at = entry.start + row * columns * dtype.itemsize
        read_exactly(source, was, at, shard.path)
        weight = torch.frombuffer(was, dtype=dtype).view(count, columns)
        size = update.add_rows(weight, row, torch.frombuffer(new, dtype=dtype).view(count, columns), scratch[0])
        if not size <= largest:  # also when it is NaN
            raise PatchError(
                f"{shard.path}: {entry.name} plus the patch is not finite in {entry.dtype}; "
                "expected finite values, lower --scale or use a base of wider range"
            )
        yield at, was, new, slot


def _copy(
    source: int, out: int, span: tuple[int, int], hashing: _Hashing, hashers: tuple[Any, ...], meter: Meter, path: Path
) -> None:
    """Copy the bytes [start, stop) to the same place of `out`, feeding the file's digest and `hashers`."""
    start, stop = span
    for at in range(start, stop, PIECE_BYTES):
        slot = hashing.slot()
        piece = slot.old[: min(PIECE_BYTES, stop - at)]
        read_exactly(source, piece, at, path)
        hashing.feed(slot, (piece, (*hashers, hashing.file)))
        if not _copy_in_kernel(source, out, at, len(piece)):
            write_exactly(out, piece, at)
        meter.add(len(piece))


def _copy_in_kernel(source: int, out: int, at: int, count: int) -> bool:
    """Let the file system copy (or share) the range; False where it cannot."""
    done = 0
    try:
        while done < count:
            copied = os.copy_file_range(source, out, count - done, at + done, at + done)
            if copied == 0:
                return False
            done += copied
    except OSError:  # not on this file system: the caller writes the bytes, and meets a full disk itself
        return False
    return True


def write_exactly(handle: int, piece: memoryview, offset: int) -> None:
    """Write all of `piece` at byte `offset` of the file. Raises OSError."""
    done = 0
    while done < len(piece):
        done += os.pwrite(handle, piece[done:], offset + done)


class _Slot:
    """A pair of buffers, and the hashing still to be done with them."""

    def __init__(self, nbytes: int) -> None:
        self.old, self.new = memoryview(bytearray(nbytes)), memoryview(bytearray(nbytes))
        self.pending: Future[None] | None = None

    def wait(self) -> None:
        """Return when the buffers are free again."""
        if self.pending is not None:
            self.pending.result()


class _Hashing:
    """The digests of one file, fed in order by one thread of its own; hashlib releases the interpreter's lock."""

    def __init__(self, longest_row: int) -> None:
        nbytes = max(PIECE_BYTES, 4 * BLOCK_ELEMENTS, longest_row)  # 4 bytes an element at most
        self.file = hashlib.sha256()
        self._slots = [_Slot(nbytes) for _ in range(SLOTS)]
        self._turn = itertools.cycle(self._slots)
        self._pool = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def slot(self) -> _Slot:
        """The next free pair of buffers."""
        slot = next(self._turn)
        slot.wait()
        return slot

    def feed(self, slot: _Slot, *work: tuple[memoryview, tuple[Any, ...]]) -> None:
        """Hash each piece with each of its hashers, later but in order; `slot` is busy until then."""
        slot.pending = self._pool.submit(_update, work)

    def wait(self) -> None:
        """Return when everything fed is hashed."""
        for slot in self._slots:
            slot.wait()

    def total(self) -> str:
        """SHA-256 of everything fed to `file`."""
        self.wait()
        return self.file.hexdigest()


def _update(work: tuple[tuple[memoryview, tuple[Any, ...]], ...]) -> None:
    for piece, hashers in work:
        for hasher in hashers:
            hasher.update(piece)


def _longest_row(shard: Header, changes: Mapping[str, Change]) -> int:
    """Bytes of the longest row among the shard's changed tensors."""
    return max((e.nbytes // max(1, e.shape[0]) for e in shard.tensors.values() if e.name in changes), default=0)


@contextlib.contextmanager
def _torch_for_blocks() -> Iterator[None]:
    """One torch thread (ours, one per shard, beat torch's own on small blocks) and true fp32 products; restored."""
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
