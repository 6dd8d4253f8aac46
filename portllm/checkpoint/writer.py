"""Writing a ported checkpoint: every shard streamed once, changed tensors in row blocks, the rest copied as bytes.

Memory stays at a few buffers per shard, whatever the model's size. Digests are taken from the bytes as they pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from portllm.algebra import lora
from portllm.checkpoint.headers import Header, TensorEntry
from portllm.checkpoint.plan import Change
from portllm.checkpoint.reader import TORCH_DTYPES, read_exactly
from portllm.errors import PatchError

PIECE_BYTES = 1 << 20
BLOCK_ELEMENTS = 1 << 18  # fp32 work of one block stays in the L2 cache

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


@dataclass
class Written:
    """One written file: its SHA-256, and the SHA-256 of its tensors before and after."""

    sha256: str = ""
    before: dict[TensorEntry, str] = field(default_factory=dict)
    after: dict[TensorEntry, str] = field(default_factory=dict)


def write_shards(
    shards: Mapping[Path, Header],
    changes: Mapping[str, Change],
    scale: float,
    known: Mapping[TensorEntry, str],
    meter: Meter,
) -> dict[Path, Written]:
    """Write each header's file, with its changes, to the path it is keyed by; shards in parallel.

    Tensors in `known` are not hashed again. Raises PatchError for non-finite values, CheckpointError when an input
    changes under us, OSError.
    """
    with _one_torch_thread(), ThreadPoolExecutor(max_workers=max(1, min(len(shards), os.cpu_count() or 1))) as pool:
        jobs = {
            target: pool.submit(_shard, shard, target, changes, scale, known, meter) for target, shard in shards.items()
        }
        try:
            for job in jobs.values():
                with contextlib.suppress(Cancelled):
                    job.result()
        finally:
            meter.cancelled.set()
    return {target: job.result() for target, job in jobs.items()}


def copy_file(source: Path, target: Path, meter: Meter) -> str:
    """Copy one file's bytes (following links) and return their SHA-256."""
    total = hashlib.sha256()
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        size = os.fstat(reading.fileno()).st_size
        for at, piece in _read(reading.fileno(), 0, size, source):
            total.update(piece)
            write_exactly(writing.fileno(), piece, at)
            meter.add(len(piece))
    return total.hexdigest()


def write_exactly(handle: int, piece: memoryview, offset: int) -> None:
    """Write all of `piece` at byte `offset` of the file. Raises OSError."""
    done = 0
    while done < len(piece):
        done += os.pwrite(handle, piece[done:], offset + done)


def _shard(
    shard: Header,
    target: Path,
    changes: Mapping[str, Change],
    scale: float,
    known: Mapping[TensorEntry, str],
    meter: Meter,
) -> Written:
    written, total = Written(), hashlib.sha256()
    try:
        with shard.path.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
            source, out = reading.fileno(), writing.fileno()
            for at, piece in _read(source, 0, shard.data_start, shard.path):
                total.update(piece)
                write_exactly(out, piece, at)
            for entry in shard.tensors.values():
                before, after = hashlib.sha256(), hashlib.sha256()
                change = changes.get(entry.name)
                for at, old, new in _pieces(source, shard, entry, change, scale):
                    total.update(new)
                    if entry not in known:
                        before.update(old)
                    if change is not None:
                        after.update(new)
                    write_exactly(out, new, at)
                    meter.add(len(new))
                written.before[entry] = known.get(entry) or before.hexdigest()
                written.after[entry] = after.hexdigest() if change is not None else written.before[entry]
    except BaseException:
        meter.cancelled.set()
        raise
    written.sha256 = total.hexdigest()
    return written


def _pieces(
    source: int, shard: Header, entry: TensorEntry, change: Change | None, scale: float
) -> Iterator[tuple[int, memoryview, memoryview]]:
    """(offset, old bytes, new bytes) from the first byte of the tensor to the last."""
    if change is not None:
        yield from _changed(source, shard, change, scale)
        return
    for at, piece in _read(source, entry.start, entry.stop, shard.path):
        yield at, piece, piece


def _changed(source: int, shard: Header, change: Change, scale: float) -> Iterator[tuple[int, memoryview, memoryview]]:
    import torch

    entry, pair = change.entry, change.pair
    a, b = pair.a.double(), pair.b.double() * (scale * pair.scaling)
    if change.transposed:
        a, b = b.T.contiguous(), a.T.contiguous()  # (ΔW)ᵀ = Aᵀ Bᵀ
    dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
    rows, columns = entry.shape
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    width = columns * dtype.itemsize
    old, new = bytearray(min(step, rows) * width), bytearray(min(step, rows) * width)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        at, piece, result = (
            entry.start + row * width,
            memoryview(old)[: count * width],
            memoryview(new)[: count * width],
        )
        if not piece:
            continue
        read_exactly(source, piece, at, shard.path)
        block = torch.frombuffer(piece, dtype=dtype).view(count, columns)
        total = lora.add_delta(block, a, b[row : row + count], 1.0)
        if not total.isfinite().all():
            raise PatchError(
                f"{shard.path}: {entry.name} plus the patch is not finite in {entry.dtype}; "
                "expected finite values, lower --scale or use a base of wider range"
            )
        torch.frombuffer(result, dtype=dtype).view(count, columns).copy_(total)
        yield at, piece, result


def _read(handle: int, start: int, stop: int, path: Path) -> Iterator[tuple[int, memoryview]]:
    buffer = memoryview(bytearray(min(PIECE_BYTES, stop - start)))
    for at in range(start, stop, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, stop - at)]
        read_exactly(handle, piece, at, path)
        yield at, piece


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """One torch thread per shard: threads of ours beat torch's own on blocks this small; restored afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
