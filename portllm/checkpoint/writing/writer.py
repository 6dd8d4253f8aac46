"""The writer of a ported checkpoint: it streams every file once, changed tensors in row blocks, the rest as bytes.

Memory is a few buffers for each file being written, independent of the model's size. Digests are computed from the
streamed bytes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from portllm.checkpoint.files.copying import copy_and_hash
from portllm.checkpoint.files.headers import Header
from portllm.checkpoint.files.progress import ByteMeter, Cancelled
from portllm.checkpoint.files.tensors import TensorEntry
from portllm.checkpoint.writing.segments import Sources, TensorSegment, cut, largest_segment, packed
from portllm.checkpoint.writing.stream import Output, Stream
from portllm.checkpoint.writing.targets import Target, TargetFile, laid_out

AHEAD = 2  # buffers of one file that are filled at the same time
SLOTS = 5  # buffers of one file: being filled, hashed and written
FILES = 4  # most files written at the same time: their buffers determine the memory


@dataclass(frozen=True)
class Job:
    """The state shared by all files of one port: cached digests of base tensors, and the meter."""

    known: Mapping[TensorEntry, str]
    meter: ByteMeter


@dataclass
class Written:
    """One written file: its BLAKE3, the digests of its tensors before and after, and its sources.

    `before` is by the base's entries of the tensors that were read; `after` is by the entries written; `sources`
    contains the identity of each file read.
    """

    digest: str = ""
    sources: dict[Path, list[int]] = field(default_factory=dict)
    before: dict[TensorEntry, str] = field(default_factory=dict)
    after: dict[TensorEntry, str] = field(default_factory=dict)


def write_files(files: Sequence[TargetFile], job: Job) -> dict[Path, Written]:
    """Write every file, synced to the disk; files and the tensors of a file are computed in parallel.

    Base tensors in `job.known` are not hashed again. The bytes do not depend on the number of threads. Raises
    PatchError for non-finite values, CheckpointError when an input changes during the write, OSError.
    """
    cores = len(os.sched_getaffinity(0))
    concurrency = max(1, min(len(files), cores, FILES))
    with _Libraries() as libraries, ThreadPoolExecutor(cores) as workers, ThreadPoolExecutor(concurrency) as pool:
        futures = {file.path: pool.submit(_write_file, file, job, workers, libraries) for file in files}
        try:
            for future in futures.values():
                with contextlib.suppress(Cancelled):
                    future.result()
        except BaseException:
            job.meter.cancelled.set()  # also on Ctrl-C: all files stop at their next segment
            raise
    return {path: future.result() for path, future in futures.items()}


def write_subset(header: Header, names: Container[str], target: Path, meter: ByteMeter) -> str:
    """Write the tensors `names` of a file to the safetensors file `target`, and return its BLAKE3."""
    targets = [Target(entry, entry) for entry in header.tensors.values() if entry.name in names]
    if len(targets) == len(header.tensors):
        return copy_and_hash(header.path, target, meter)
    before = meter.done
    written = write_files([laid_out(targets, header.metadata, target)], Job({}, meter))
    meter.add(header.size - (meter.done - before))  # the omitted tensors count as done
    return written[target].digest


def _write_file(file: TargetFile, job: Job, workers: Executor, libraries: _Libraries) -> Written:
    """Write one file from its first byte to its last, synced to the disk."""
    written, digests = Written(), []
    capacity = largest_segment(file)
    try:
        with contextlib.ExitStack() as stack:
            sources = Sources(file, stack)
            output = stack.enter_context(Output(file.path, file.nbytes, sources.twin()))
            stream = stack.enter_context(Stream(output, workers, capacity=capacity, slots=SLOTS, ahead=AHEAD))
            for group in packed(cut(file, sources, job.known, libraries.torch), capacity):
                stream.put(group)
                digests += [s.digests for s in group if isinstance(s, TensorSegment) and s.offset == 0]
                job.meter.add(sum(segment.nbytes for segment in group))
            written.digest = stream.finish()
            sources.check()
            written.sources = sources.identities
    except BaseException:
        job.meter.cancelled.set()
        raise
    for digest in digests:
        origin = digest.target.origin
        if origin is not None:
            written.before[origin] = str(digest.before)
        written.after[digest.target.entry] = str(digest.after)
    return written


class _Libraries:
    """Limits numpy's and torch's products to one thread each: one writer thread per core is faster than theirs."""

    def __init__(self) -> None:
        self._stack, self._lock, self._torch = contextlib.ExitStack(), threading.Lock(), False

    def __enter__(self) -> _Libraries:
        import numpy  # noqa: F401  (threadpoolctl limits only loaded libraries)
        from threadpoolctl import threadpool_limits

        self._stack.enter_context(threadpool_limits(1, user_api="blas"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def torch(self) -> None:
        """Limit torch as well; it is imported only where an edit needs it."""
        with self._lock:
            if not self._torch:
                self._stack.enter_context(_torch_for_blocks())
                self._torch = True


@contextlib.contextmanager
def _torch_for_blocks() -> Iterator[None]:
    """Set one torch thread (one writer thread per core is faster on small blocks) and true fp32 products; restore."""
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
