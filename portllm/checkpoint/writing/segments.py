"""The segments of a written file: its head, byte ranges copied as they are, rows of edited tensors."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from portllm.checkpoint.files.hashing import identity, tensor_hash
from portllm.checkpoint.files.reading import open_input, read_exactly
from portllm.checkpoint.files.tensors import ARRAY_DTYPES, TORCH_DTYPES, TensorEntry
from portllm.checkpoint.writing.stream import room
from portllm.checkpoint.writing.targets import Target, TargetFile
from portllm.errors import CheckpointError, PatchError

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit

SEGMENT_BYTES = 2 << 20  # at most, unless a row is longer

# the largest finite number of each dtype that is computed with
LARGEST = {
    "F64": sys.float_info.max, "F32": (2 - 2**-23) * 2.0**127, "F16": 65504.0, "BF16": (2 - 2**-7) * 2.0**127,
}  # fmt: skip

_OWN = threading.local()


class Sources:
    """The base's files that one file is made from, held open."""

    def __init__(self, file: TargetFile, stack: contextlib.ExitStack) -> None:
        self.path, self._file = file.path, file
        self._files = {target.origin.path: target.origin.file for target in file.targets if target.origin is not None}
        self._handles = {path: stack.enter_context(open_input(path)).fileno() for path in self._files}
        self.identities = {path: identity(os.fstat(handle)) for path, handle in self._handles.items()}

    def read(self, origin: TensorEntry, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a tensor. Raises CheckpointError."""
        read_exactly(self._handles[origin.path], buffer, origin.start + offset, origin.path)

    def twin(self) -> int | None:
        """Return the handle of the one file that the written one is a copy of, but for edits, byte for byte."""
        if len(self._handles) != 1:
            return None
        ((path, handle),) = self._handles.items()
        kept = all(t.origin is not None and _same_place(t.origin, t.entry) for t in self._file.targets)
        return handle if kept and len(self._file.head) == self._files[path].data_start else None

    def check(self) -> None:
        """Raise CheckpointError where a file is not what it was when its header was read, or when it was opened."""
        for path, handle in self._handles.items():
            now, was = identity(os.fstat(handle)), self.identities[path]
            if now[:4] != was[:4] or now[2] != self._files[path].size:
                raise CheckpointError(f"{path}: changed while it was read; leave inputs alone and try again")


class Digests:
    """The digests of one tensor, once finished: `before`, of the base's bytes, and `after`, of those written.

    `known` is the digest of the base's bytes where it is cached.
    """

    def __init__(self, target: Target, known: str | None) -> None:
        self.target, self.before, self.after = target, known, known
        edited = target.edit is not None
        self._old = tensor_hash() if edited and target.origin is not None and known is None else None
        self._new = tensor_hash() if edited or known is None else None

    def update(self, old: memoryview, new: memoryview) -> None:
        """Add the next bytes."""
        if self._old is not None:
            self._old.update(old)
        if self._new is not None:
            self._new.update(new)

    def finish(self) -> None:
        """Set the digests: there are no more bytes."""
        if self._new is not None:
            self.after = self._new.hexdigest()
        if self.before is None:
            self.before = self._old.hexdigest() if self._old is not None else self.after
        self._old = self._new = None


@dataclass(frozen=True)
class HeadSegment:
    """The first bytes of a file."""

    data: bytes
    copied: bool = False

    @property
    def nbytes(self) -> int:
        """The length in bytes."""
        return len(self.data)

    def fill(self, old: memoryview, new: memoryview) -> None:  # noqa: ARG002  (the protocol's signature)
        """Write the bytes into `new`."""
        new[:] = self.data

    def digest(self, old: memoryview, new: memoryview) -> None:
        """Do nothing: the bytes belong to no tensor."""


@dataclass(frozen=True)
class TensorSegment:
    """Bytes of one tensor: `nbytes` from `offset` on, copied, or rows that `edit` computes."""

    digests: Digests
    sources: Sources
    edit: Edit | None
    offset: int
    nbytes: int

    @property
    def copied(self) -> bool:
        """Whether the bytes are the base's."""
        return self.edit is None

    def fill(self, old: memoryview, new: memoryview) -> None:
        """Read or compute the bytes. Raises CheckpointError, PatchError where one is not finite."""
        target = self.digests.target
        if self.edit is not None:
            self._compute(self.edit, target, old, new)
        elif target.origin is not None:
            self.sources.read(target.origin, self.offset, new)
        else:
            raise ValueError(f"{target.entry.name} has neither an origin nor an edit")

    def digest(self, old: memoryview, new: memoryview) -> None:
        """Add the bytes to the tensor's digests."""
        self.digests.update(old, new)
        if self.offset + self.nbytes == self.digests.target.entry.nbytes:
            self.digests.finish()

    def _compute(self, edit: Edit, target: Target, old: memoryview, new: memoryview) -> None:
        if not self.nbytes:
            return
        entry, before = target.entry, None
        if target.origin is not None:
            self.sources.read(target.origin, self.offset, old)
            before = _rows(old, entry, edit)
        # after a header of odd length, tensors that stand as on the disk's pages are not aligned in memory
        aligned = new if (entry.start + self.offset) % entry.width == 0 else memoryview(bytearray(self.nbytes))
        row, out = self.offset // entry.row_bytes, _rows(aligned, entry, edit)
        if (
            not edit.rows(before, row, out, _scratch(edit, self.nbytes // entry.width)) <= LARGEST[entry.dtype]
        ):  # also when it is NaN
            self._refuse(target, before)
        if aligned is not new:
            new[:] = aligned

    def _refuse(self, target: Target, before: Any) -> NoReturn:
        """Raise the error for a sum that is not finite, or for a base that was not."""
        from portllm.algebra.sums import as_array, largest

        name, dtype = target.entry.name, target.entry.dtype
        where = target.origin.path if target.origin is not None else self.sources.path
        if before is not None and not largest(as_array(before)) <= LARGEST[dtype]:
            raise CheckpointError(
                f"{where}: {name} holds NaN or infinity; expected finite values, fetch the file again"
            )
        raise PatchError(
            f"{where}: {name} plus the patch is not finite in {dtype}; "
            "expected finite values, lower --scale or use a base of wider range"
        )


def cut(
    file: TargetFile, sources: Sources, known: Mapping[TensorEntry, str], on_torch: Callable[[], None]
) -> Iterator[HeadSegment | TensorSegment]:
    """Yield the segments of a file in order. Reads the patch's factors, and old rows for edits that survey them first.

    `on_torch` is called before torch computes.
    """
    yield from (HeadSegment(file.head[at : at + SEGMENT_BYTES]) for at in range(0, len(file.head), SEGMENT_BYTES))
    for target in file.targets:
        digests = Digests(target, known.get(target.origin) if target.origin is not None else None)
        edit = target.edit() if target.edit is not None else None
        if edit is not None and not _takes_arrays(edit):
            on_torch()
        if edit is not None and edit.surveys:
            _survey(edit, target, sources)
        for offset, nbytes in _spans(target):
            yield TensorSegment(digests, sources, edit, offset, nbytes)


def packed(
    segments: Iterable[HeadSegment | TensorSegment], capacity: int
) -> Iterator[list[HeadSegment | TensorSegment]]:
    """Yield consecutive segments in groups that fit into a buffer of `capacity` bytes together, or single ones."""
    group: list[HeadSegment | TensorSegment] = []
    free = capacity
    for segment in segments:
        if group and room(segment.nbytes) > free:
            yield group
            group, free = [], capacity
        group.append(segment)
        free -= room(segment.nbytes)
    if group:
        yield group


def largest_segment(file: TargetFile) -> int:
    """Return the size in bytes of a buffer that every segment of the file fits into."""
    return max(
        (room(max(SEGMENT_BYTES, t.entry.row_bytes)) for t in file.targets if t.edit is not None), default=SEGMENT_BYTES
    )


def _spans(target: Target) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) in bytes of a tensor's segments: complete rows if edited; an empty tensor has one."""
    entry, step = target.entry, SEGMENT_BYTES
    if target.edit is not None:
        step = max(1, SEGMENT_BYTES // entry.row_bytes) * entry.row_bytes
    for offset in range(0, max(1, entry.nbytes), step):
        yield offset, min(step, entry.nbytes - offset)


def _survey(edit: Edit, target: Target, sources: Sources) -> None:
    if target.origin is None:
        raise ValueError(f"{target.entry.name}: an edit that surveys the old tensor was given none")
    for offset, nbytes in _spans(target):
        buffer = memoryview(bytearray(nbytes))
        sources.read(target.origin, offset, buffer)
        old = _rows(buffer, target.entry, edit)
        edit.survey(old, offset // target.entry.row_bytes, _scratch(edit, nbytes // target.entry.width))


def _takes_arrays(edit: Edit) -> bool:
    """Return whether an edit computes with numpy's arrays: then torch, which takes long to import, is not needed."""
    return getattr(edit, "arrays", False)


def _rows(buffer: memoryview, entry: TensorEntry, edit: Edit) -> Any:
    """Return complete rows of a tensor, seen as (rows, columns), in the memory of `buffer`."""
    if _takes_arrays(edit):
        import numpy

        return numpy.frombuffer(buffer, ARRAY_DTYPES[entry.dtype]).reshape(-1, entry.columns)
    import torch

    return torch.frombuffer(buffer, dtype=getattr(torch, TORCH_DTYPES[entry.dtype])).view(-1, entry.columns)


def _same_place(origin: TensorEntry, entry: TensorEntry) -> bool:
    """Return whether an entry is its origin's in another file: same name, dtype, shape and bytes."""
    return replace(entry, file=origin.file) == origin


def _scratch(edit: Edit, elements: int) -> Any:
    """Return this thread's work space for edits by torch."""
    if _takes_arrays(edit):
        return None
    from portllm.algebra.lora import Scratch

    kept: Scratch | None = getattr(_OWN, "scratch", None)
    if kept is None or kept.elements < elements:
        kept = _OWN.scratch = Scratch(elements)
    return kept
