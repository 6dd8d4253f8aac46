"""Writing a ported checkpoint: every file streamed once, changed tensors in row blocks, the rest copied as bytes.

Memory stays at a few buffers per file, whatever the model's size. Digests are taken from the bytes as they pass, by a
thread beside the one that computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.fingerprint import identity
from portllm.checkpoint.headers import Header, TensorEntry
from portllm.checkpoint.placing import laid_out as laid_out
from portllm.checkpoint.placing import nbytes as nbytes
from portllm.checkpoint.placing import plain_file as plain_file
from portllm.checkpoint.reader import TORCH_DTYPES, read_exactly
from portllm.checkpoint.targets import Target, TargetFile
from portllm.errors import CheckpointError, PatchError

if TYPE_CHECKING:
    import torch

    from portllm.algebra.edits import Edit
    from portllm.algebra.lora import Scratch

PIECE_BYTES = 1 << 20
BLOCK_ELEMENTS = 1 << 19  # larger blocks leave the L2 cache, smaller ones pay for the calls
SLOTS = 3  # buffers per shard: one computed, one hashed, one waiting

Progress = Callable[[int, int], None]


class Cancelled(Exception):
    """Another shard failed; this one stopped early."""


class Meter:
    """Bytes written so far, over all files; calls `on_progress(done, total)` one call at a time."""

    def __init__(self, total: int, on_progress: Progress | None = None) -> None:
        self.total, self.done = total, 0
        self.cancelled = threading.Event()
        self._on_progress, self._lock = on_progress, threading.Lock()

    def add(self, count: int) -> None:
        """Count `count` more bytes. Raises Cancelled when another file has failed."""
        if self.cancelled.is_set():
            raise Cancelled
        with self._lock:
            self.done += count
            if self._on_progress is not None:
                self._on_progress(self.done, self.total)


@dataclass(frozen=True)
class Job:
    """What all files of one port share: digests of base tensors known beforehand, and the meter."""

    known: Mapping[TensorEntry, str]
    meter: Meter


@dataclass
class Written:
    """One written file: its SHA-256, the digests of its tensors before and after, and what it was made from.

    `before` is keyed by the base's entries, of the tensors that were read; `after` by the entries written; `sources`
    holds the identity of each file read.
    """

    sha256: str = ""
    sources: dict[Path, list[int]] = field(default_factory=dict)
    before: dict[TensorEntry, str] = field(default_factory=dict)
    after: dict[TensorEntry, str] = field(default_factory=dict)


def write_files(files: Sequence[TargetFile], job: Job) -> dict[Path, Written]:
    """Write every file, synced to the disk; files in parallel.

    Base tensors in `job.known` are not hashed again. Raises PatchError for non-finite values, CheckpointError when an
    input changes under us, OSError.
    """
    workers = max(1, min(len(files), os.cpu_count() or 1))
    with _torch_for_blocks(), ThreadPoolExecutor(max_workers=workers) as pool:
        futures = {file.path: pool.submit(_write_file, file, job) for file in files}
        try:
            for future in futures.values():
                with contextlib.suppress(Cancelled):
                    future.result()
        finally:
            job.meter.cancelled.set()  # on a failure or Ctrl-C the other files stop at their next block
    return {path: future.result() for path, future in futures.items()}


def copy_file(source: Path, target: Path, meter: Meter) -> str:
    """Copy one file's bytes (following links) and return their SHA-256."""
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing, _Hashing(0) as hashing:
        size = os.fstat(reading.fileno()).st_size
        _copy((reading.fileno(), 0, source), (writing.fileno(), 0), size, hashing, (), meter)
        return hashing.total()


def write_subset(header: Header, names: Container[str], target: Path, meter: Meter) -> str:
    """Write the tensors `names` of a file as a safetensors file of its own; returns its SHA-256."""
    kept = [Target(entry, (header, entry)) for entry in header.tensors.values() if entry.name in names]
    if len(kept) == len(header.tensors):
        return copy_file(header.path, target, meter)
    file = laid_out(kept, header.metadata, target)
    before = meter.done
    written = _write_file(file, Job({}, meter))
    meter.add(header.size - (meter.done - before))  # what was left out is done too
    return written.sha256


def _write_file(file: TargetFile, job: Job) -> Written:
    """One file from its first byte to its last, synced to the disk."""
    written = Written()
    try:
        with contextlib.ExitStack() as stack:
            sources = _Sources(file, stack)
            out = stack.enter_context(file.path.open("wb", buffering=0)).fileno()
            hashing = stack.enter_context(_Hashing(_longest_row(file)))
            _write_head(out, file.head, hashing, job.meter)
            scratch: list[Scratch] = []
            for target in file.targets:
                _write_tensor(target, sources, out, job, hashing, scratch, written)
            written.sha256 = hashing.total()
            sources.check()
            written.sources = sources.identities
            os.fsync(out)  # here, so that it overlaps with the other files' work
    except BaseException:
        job.meter.cancelled.set()
        raise
    return written


class _Sources:
    """The base's files that one file is made from, held open."""

    def __init__(self, file: TargetFile, stack: contextlib.ExitStack) -> None:
        headers = {header.path: header for header, _ in (t.origin for t in file.targets if t.origin is not None)}
        self._headers = headers
        self.handles = {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in headers}
        self.identities = {path: identity(os.fstat(handle)) for path, handle in self.handles.items()}

    def check(self) -> None:
        """Raise CheckpointError where a file is not what it was when its header was read, or when it was opened."""
        for path, handle in self.handles.items():
            now = identity(os.fstat(handle))
            if now[:4] != self.identities[path][:4] or now[2] != self._headers[path].size:
                raise CheckpointError(f"{path}: changed while it was read; leave inputs alone and try again")


def _write_head(out: int, head: bytes, hashing: _Hashing, meter: Meter) -> None:
    write_exactly(out, memoryview(head), 0)
    hashing.file.update(head)
    meter.add(len(head))


def _write_tensor(
    target: Target, sources: _Sources, out: int, job: Job, hashing: _Hashing, scratch: list[Scratch], written: Written
) -> None:
    before, after = hashlib.sha256(), hashlib.sha256()
    origin = target.origin[1] if target.origin is not None else None
    digest = job.known.get(origin) or written.before.get(origin) if origin is not None else None
    old = () if origin is None or digest is not None else (before,)
    if target.edit is not None:
        for at, was, new, slot in _edited(target, target.edit(), sources, hashing, scratch):
            write_exactly(out, new, at)
            hashing.feed(slot, (was, old), (new, (after,)), (new, (hashing.file,)))
            job.meter.add(len(new))
    elif target.origin is not None:
        header, entry = target.origin
        source = (sources.handles[header.path], entry.start, header.path)
        _copy(source, (out, target.entry.start), entry.nbytes, hashing, old, job.meter)
    else:
        raise ValueError(f"{target.entry.name} has neither origin nor edit")
    hashing.wait()
    if origin is not None:
        written.before[origin] = digest = digest or before.hexdigest()
    written.after[target.entry] = digest if target.edit is None and digest else after.hexdigest()


def _edited(
    target: Target, edit: Edit, sources: _Sources, hashing: _Hashing, scratch: list[Scratch]
) -> Iterator[tuple[int, memoryview, memoryview, _Slot]]:
    """(offset, old bytes, new bytes, their slot) of an edited tensor, block of rows by block of rows."""
    import torch

    dtype = getattr(torch, TORCH_DTYPES[target.entry.dtype])
    largest = torch.finfo(dtype).max
    columns = _columns(target.entry)
    _reserve(scratch, columns)
    if edit.surveys:
        for row, count in _row_blocks(target.entry):
            slot = hashing.slot()
            edit.survey(_old(target, row, count, sources, slot)[1], row, scratch[0])
    for row, count in _row_blocks(target.entry):
        slot = hashing.slot()
        was, old = memoryview(b""), None
        if target.origin is not None:
            was, old = _old(target, row, count, sources, slot)
        new = slot.new[: count * columns * dtype.itemsize]
        size = edit.rows(old, row, torch.frombuffer(new, dtype=dtype).view(count, columns), scratch[0])
        if not size <= largest:  # also when it is NaN
            where = target.origin[0].path if target.origin is not None else target.entry.name
            raise PatchError(
                f"{where}: {target.entry.name} plus the patch is not finite in {target.entry.dtype}; "
                "expected finite values, lower --scale or use a base of wider range"
            )
        yield target.entry.start + row * columns * dtype.itemsize, was, new, slot


def _old(target: Target, row: int, count: int, sources: _Sources, slot: _Slot) -> tuple[memoryview, torch.Tensor]:
    """The base's rows [row, row + count), as bytes and as a tensor (count, columns), in the slot's memory."""
    import torch

    assert target.origin is not None  # noqa: S101  (an edit of nothing surveys nothing)
    header, entry = target.origin
    columns, dtype = _columns(entry), getattr(torch, TORCH_DTYPES[entry.dtype])
    was = slot.old[: count * columns * dtype.itemsize]
    read_exactly(sources.handles[header.path], was, entry.start + row * columns * dtype.itemsize, header.path)
    return was, torch.frombuffer(was, dtype=dtype).view(count, columns)


def _columns(entry: TensorEntry) -> int:
    return entry.shape[-1] if entry.shape else 1


def _row_blocks(entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """(first row, count) of the blocks of a tensor seen as (rows, columns)."""
    columns = _columns(entry)
    rows = math.prod(entry.shape[:-1]) if columns else 0
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for row in range(0, rows, step):
        yield row, min(step, rows - row)


def _reserve(scratch: list[Scratch], columns: int) -> None:
    from portllm.algebra.lora import Scratch

    needed = max(BLOCK_ELEMENTS, columns)
    if not scratch or scratch[0].elements < needed:
        scratch[:] = [Scratch(needed)]


def _copy(
    source: tuple[int, int, Path],
    target: tuple[int, int],
    nbytes: int,
    hashing: _Hashing,
    hashers: tuple[Any, ...],
    meter: Meter,
) -> None:
    """Copy bytes from (handle, offset, path) to (handle, offset), feeding the file's digest and `hashers`."""
    reading, start, path = source
    writing, to = target
    for done in range(0, nbytes, PIECE_BYTES):
        slot = hashing.slot()
        piece = slot.old[: min(PIECE_BYTES, nbytes - done)]
        read_exactly(reading, piece, start + done, path)
        hashing.feed(slot, (piece, (*hashers, hashing.file)))
        if not _copy_in_kernel((reading, start + done), (writing, to + done), len(piece)):
            write_exactly(writing, piece, to + done)
        meter.add(len(piece))


def _copy_in_kernel(source: tuple[int, int], target: tuple[int, int], count: int) -> bool:
    """Let the file system copy (or share) the range; False where it cannot."""
    done = 0
    try:
        while done < count:
            copied = os.copy_file_range(source[0], target[0], count - done, source[1] + done, target[1] + done)
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


def _longest_row(file: TargetFile) -> int:
    """Bytes of the longest row among the file's edited tensors."""
    rows = ((t.entry.nbytes, math.prod(t.entry.shape[:-1])) for t in file.targets if t.edit is not None)
    return max((size // max(1, count) for size, count in rows), default=0)


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
