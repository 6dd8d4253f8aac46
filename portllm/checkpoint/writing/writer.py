"""Writing a ported checkpoint: every file streamed once, changed tensors in row blocks, the rest copied as bytes.

Memory stays at a few buffers per file under way, whatever the model's size. Digests are taken from the bytes as they
pass.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from portllm.checkpoint.files.hashing import file_hash
from portllm.checkpoint.files.headers import Header, TensorEntry, open_input, reading
from portllm.checkpoint.writing.placing import laid_out, nbytes
from portllm.checkpoint.writing.segments import Part, Sources, cut, largest_piece, packed
from portllm.checkpoint.writing.stream import Output, Stream
from portllm.checkpoint.writing.targets import Target, TargetFile

COPY_BYTES = 1 << 20
AHEAD = 2  # buffers of one file that are filled at a time
SLOTS = 5  # buffers of one file: those, and others being hashed and written
FILES = 4  # under way at once, at most: their buffers are what memory goes to

Progress = Callable[[int, int], None]


class Cancelled(Exception):
    """Another file failed; this one stopped early."""


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
    """One written file: its BLAKE3, the digests of its tensors before and after, and what it was made from.

    `before` is keyed by the base's entries, of the tensors that were read; `after` by the entries written; `sources`
    holds the identity of each file read.
    """

    digest: str = ""
    sources: dict[Path, list[int]] = field(default_factory=dict)
    before: dict[TensorEntry, str] = field(default_factory=dict)
    after: dict[TensorEntry, str] = field(default_factory=dict)


def write_files(files: Sequence[TargetFile], job: Job) -> dict[Path, Written]:
    """Write every file, synced to the disk; files in parallel, and the tensors of one.

    Base tensors in `job.known` are not hashed again. The bytes do not depend on the number of threads. Raises
    PatchError for non-finite values, CheckpointError when an input changes under us, OSError.
    """
    cores = len(os.sched_getaffinity(0))
    at_once = max(1, min(len(files), cores, FILES))
    with _Libraries() as libraries, ThreadPoolExecutor(cores) as workers, ThreadPoolExecutor(at_once) as pool:
        futures = {file.path: pool.submit(_write_file, file, job, workers, libraries) for file in files}
        try:
            for future in futures.values():
                with contextlib.suppress(Cancelled):
                    future.result()
        except BaseException:
            job.meter.cancelled.set()  # Ctrl-C, too, stops the files at their next piece
            raise
    return {path: future.result() for path, future in futures.items()}


def copy_file(source: Path, target: Path, meter: Meter) -> str:
    """Copy one file's bytes (following links) and return their BLAKE3."""
    digest = file_hash("blake3")
    buffer = memoryview(bytearray(COPY_BYTES))
    with open_input(source) as file, target.open("wb") as writing:
        while count := _read(file, buffer, source):
            digest.update(buffer[:count])
            writing.write(buffer[:count])
            meter.add(count)
    return digest.hexdigest()


def _read(file: BinaryIO, buffer: memoryview, path: Path) -> int:
    with reading(path):
        return os.readv(file.fileno(), [buffer])


def write_subset(header: Header, names: Container[str], target: Path, meter: Meter) -> str:
    """Write the tensors `names` of a file as a safetensors file of its own; returns its BLAKE3."""
    kept = [Target(entry, (header, entry)) for entry in header.tensors.values() if entry.name in names]
    if len(kept) == len(header.tensors):
        return copy_file(header.path, target, meter)
    before = meter.done
    written = write_files([laid_out(kept, header.metadata, target)], Job({}, meter))
    meter.add(header.size - (meter.done - before))  # what was left out is done too
    return written[target].digest


def _write_file(file: TargetFile, job: Job, workers: Executor, libraries: _Libraries) -> Written:
    """One file from its first byte to its last, synced to the disk."""
    written, digests = Written(), []
    capacity = largest_piece(file)
    try:
        with contextlib.ExitStack() as stack:
            sources = Sources(file, stack)
            output = stack.enter_context(Output(file.path, nbytes(file), sources.twin()))
            stream = stack.enter_context(Stream(output, workers, capacity=capacity, slots=SLOTS, ahead=AHEAD))
            for group in packed(cut(file, sources, job.known, libraries.torch), capacity):
                stream.put(group)
                digests += [piece.digests for piece in group if isinstance(piece, Part) and piece.offset == 0]
                job.meter.add(sum(piece.nbytes for piece in group))
            written.digest = stream.finish()
            sources.check()
            written.sources = sources.identities
    except BaseException:
        job.meter.cancelled.set()
        raise
    for digest in digests:
        origin = digest.target.origin
        if origin is not None:
            written.before[origin[1]] = str(digest.before)
        written.after[digest.target.entry] = str(digest.after)
    return written


class _Libraries:
    """One thread for each of numpy's and torch's products while inside: ours, one per core, beat their own."""

    def __init__(self) -> None:
        self._stack, self._lock, self._torch = contextlib.ExitStack(), threading.Lock(), False

    def __enter__(self) -> _Libraries:
        import numpy  # noqa: F401  (loaded, so that its products can be limited)
        from threadpoolctl import threadpool_limits

        self._stack.enter_context(threadpool_limits(1, user_api="blas"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def torch(self) -> None:
        """Settle torch, too, which is imported only where an edit needs it."""
        with self._lock:
            if not self._torch:
                self._stack.enter_context(_torch_for_blocks())
                self._torch = True


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
