"""The stream of one file's bytes to the disk, through a few reused buffers, hashed in order.

Writes bypass the page cache where the file system allows it (O_DIRECT): a port must be on the disk when it returns, and
filling the cache first costs more processor time than all the arithmetic. Filling of buffers, the file's digest, the
tensors' digests and the disk each have separate threads; all of them release the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from portllm.checkpoint.files.copying import share_blocks
from portllm.checkpoint.files.hashing import file_hash
from portllm.checkpoint.files.output import sync

ALIGN = 4096  # bytes: alignment of offset, length and memory in a direct write; a page
ROOM = 64  # bytes: the buffer of each segment starts at a multiple of this, so that every tensor is aligned
DISK_THREADS = 2  # concurrent writes of one file


class Segment(Protocol):
    """Some bytes of a written file, and the computation that produces them."""

    @property
    def nbytes(self) -> int:
        """The number of bytes."""

    @property
    def copied(self) -> bool:
        """Whether they equal the bytes of the file's twin at the same offset."""

    def fill(self, old: memoryview, new: memoryview) -> None:
        """Write the bytes into `new`; `old` is work space of the same length. Segments are filled in any order."""

    def digest(self, old: memoryview, new: memoryview) -> None:
        """Add the bytes to the digests of their tensor; called in the file's order, one segment at a time."""


class Output:
    """A file being written, directly to the disk where possible; it is on the disk when closed without error.

    `cloned`: the file shares the blocks of its twin (btrfs, XFS), so that only differing bytes are written.
    """

    def __init__(self, path: Path, size: int, twin: int | None = None) -> None:
        """Open the file; `twin` is the handle of an open file with mostly the same bytes at the same offsets."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._path, self._size, self._lock = path, size, threading.Lock()
        try:
            self._handle, self._direct = os.open(path, flags | os.O_DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._handle, self._direct = os.open(path, flags, 0o666), False
        self.cloned = twin is not None and self._clone(twin)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.ftruncate(self._handle, self._size)  # the last direct write was a complete page
                sync(self._handle, self._path)
        finally:
            os.close(self._handle)

    def write(self, segment: memoryview, offset: int) -> None:
        """Write `segment` at byte `offset`; if not cloned, complete pages at the offset of a page. Raises OSError."""
        is_direct = self._direct  # another thread may switch to the cache meanwhile
        try:
            write_exactly(self._handle, segment, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct:
                raise
            self._turn_to_the_cache()  # the file system accepted O_DIRECT at open and refuses it now
            write_exactly(self._handle, segment, offset)
        if not self._direct and len(segment):
            # on Linux this starts the write-back of dirty pages, so that fsync does not wait for all at once
            os.posix_fadvise(self._handle, offset, len(segment), os.POSIX_FADV_DONTNEED)

    def _clone(self, twin: int) -> bool:
        if not share_blocks(twin, self._handle):  # the bytes are written instead
            return False
        self._turn_to_the_cache()  # the differing bytes are not complete pages
        return True

    def _turn_to_the_cache(self) -> None:
        with self._lock:
            flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False


def write_exactly(handle: int, segment: memoryview, offset: int) -> None:
    """Write all of `segment` at byte `offset` of the file. Raises OSError."""
    done = 0
    while done < len(segment):
        done += os.pwrite(handle, segment[done:], offset + done)


class _Slot:
    """A pair of buffers on page boundaries, and the pending work on them."""

    def __init__(self, nbytes: int) -> None:
        self.old, self.new = memoryview(mmap.mmap(-1, nbytes)), memoryview(mmap.mmap(-1, nbytes + 2 * ALIGN))
        self.position = self.start = self.stop = 0
        self.views: list[tuple[Segment, memoryview, memoryview]] = []
        self.pending: list[Future[None]] = []

    def place(self, segments: Sequence[Segment], position: int) -> None:
        """Lay out `segments`, which begin at byte `position` of the file, with the alignment of the disk's pages."""
        self.position, self.start = position, position % ALIGN
        self.stop, self.views, spare = self.start, [], 0
        for segment in segments:
            old, new = (spare, spare + segment.nbytes), (self.stop, self.stop + segment.nbytes)
            self.views.append((segment, self.old[slice(*old)], self.new[slice(*new)]))
            spare, self.stop = spare + room(segment.nbytes), new[1]

    def fill(self) -> None:
        """Fill all segments."""
        for segment, old, new in self.views:
            segment.fill(old, new)

    def digest(self) -> None:
        """Add all segments to their tensors' digests."""
        for segment, old, new in self.views:
            segment.digest(old, new)

    def wait(self) -> None:
        """Return when the buffers are free again. Raises the error of pending work."""
        for future in self.pending:
            future.result()


class Stream:
    """A file's segments in order: `workers` fill them, then they go to the digests and the disk."""

    def __init__(self, output: Output, workers: Executor, *, capacity: int, slots: int, ahead: int) -> None:
        """Take `capacity`, the most bytes (in `room`s) of one `put`, and `ahead`, the most buffers filled at a time."""
        self._output, self._workers, self._ahead = output, workers, ahead
        self._slots = [_Slot(capacity) for _ in range(slots)]
        self._turn = itertools.cycle(self._slots)
        self._filling: deque[tuple[_Slot, Future[None]]] = deque()
        self._position, self._tail = 0, b""
        self._digest = file_hash("blake3")
        self._file_hashing, self._tensor_hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._disk = ThreadPoolExecutor(DISK_THREADS)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        for _slot, future in self._filling:
            if not future.cancel():
                with contextlib.suppress(Exception):
                    future.result()
        for pool in (self._file_hashing, self._tensor_hashing, self._disk):
            pool.shutdown(cancel_futures=True)

    def put(self, segments: Sequence[Segment]) -> None:
        """Accept the next segments of the file. Raises the error of an earlier segment."""
        slot = next(self._turn)
        slot.wait()
        slot.place(segments, self._position)
        self._position += slot.stop - slot.start
        self._filling.append((slot, self._workers.submit(slot.fill)))
        if len(self._filling) > self._ahead:
            self._pass_on()

    def finish(self) -> str:
        """Write the remaining bytes and return the BLAKE3 of the file. Raises the error of a segment."""
        while self._filling:
            self._pass_on()
        for slot in self._slots:
            slot.wait()
        if self._tail and not self._output.cloned:
            last = self._slots[0].new[:ALIGN]
            last[: len(self._tail)] = self._tail
            self._output.write(last, self._position - len(self._tail))
        return self._digest.hexdigest()

    def _pass_on(self) -> None:
        """Pass the oldest filled buffer to the digests and, after the rest of the previous one, to the disk."""
        slot, future = self._filling.popleft()
        future.result()
        slot.new[: slot.start] = self._tail
        pages_end = slot.stop - slot.stop % ALIGN
        self._tail = bytes(slot.new[pages_end : slot.stop])
        slot.pending = [
            self._file_hashing.submit(self._take, slot.new[slot.start : slot.stop]),
            self._tensor_hashing.submit(slot.digest),
            *self._disk_work(slot, pages_end),
        ]

    def _take(self, data: memoryview) -> None:
        self._digest.update(data)

    def _disk_work(self, slot: _Slot, pages_end: int) -> Iterator[Future[None]]:
        if not self._output.cloned:
            yield self._disk.submit(self._output.write, slot.new[:pages_end], slot.position - slot.start)
            return
        offset = slot.position
        for segment, _, new in slot.views:
            if not segment.copied:
                yield self._disk.submit(self._output.write, new, offset)
            offset += segment.nbytes


def room(nbytes: int) -> int:
    """Return the bytes of a buffer that a segment of `nbytes` occupies."""
    return nbytes + -nbytes % ROOM
