"""The pieces a written file is made of: its head, byte ranges copied as they are, rows of edited tensors."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from portllm.checkpoint.base.checkpoint import ARRAY_DTYPES, TORCH_DTYPES, read_exactly
from portllm.checkpoint.files.hashing import identity, tensor_hash
from portllm.checkpoint.files.headers import BITS, Header, TensorEntry, open_input
from portllm.checkpoint.writing.stream import room
from portllm.checkpoint.writing.targets import Target, TargetFile
from portllm.errors import CheckpointError, PatchError

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit

PIECE_BYTES = 2 << 20  # at most, unless a row is longer

# the largest finite number of each dtype that is computed with
LARGEST = {
    "F64": sys.float_info.max, "F32": (2 - 2**-23) * 2.0**127, "F16": 65504.0, "BF16": (2 - 2**-7) * 2.0**127,
}  # fmt: skip

_OWN = threading.local()


class Sources:
    """The base's files that one file is made from, held open."""

    def __init__(self, file: TargetFile, stack: contextlib.ExitStack) -> None:
        self.path, self._file = file.path, file
        self._headers = {header.path: header for header, _ in (t.origin for t in file.targets if t.origin is not None)}
        self._handles = {path: stack.enter_context(open_input(path)).fileno() for path in self._headers}
        self.identities = {path: identity(os.fstat(handle)) for path, handle in self._handles.items()}

    def read(self, origin: tuple[Header, TensorEntry], offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a tensor. Raises CheckpointError."""
        header, entry = origin
        read_exactly(self._handles[header.path], buffer, entry.start + offset, header.path)

    def twin(self) -> int | None:
        """The handle of the one file that the written one is a copy of, but for edits, byte for byte."""
        if len(self._handles) != 1:
            return None
        ((path, handle),) = self._handles.items()
        kept = all(t.origin is not None and t.origin[1] == t.entry for t in self._file.targets)
        return handle if kept and len(self._file.head) == self._headers[path].data_start else None

    def check(self) -> None:
        """Raise CheckpointError where a file is not what it was when its header was read, or when it was opened."""
        for path, handle in self._handles.items():
            now, was = identity(os.fstat(handle)), self.identities[path]
            if now[:4] != was[:4] or now[2] != self._headers[path].size:
                raise CheckpointError(f"{path}: changed while it was read; leave inputs alone and try again")


class Digests:
    """The digests of one tensor, once finished: `before`, as it was, unless that is known, and `after`, as written."""

    def __init__(self, target: Target, known: str | None) -> None:
        self.target, self.before, self.after = target, known, known
        edited = target.edit is not None
        self._old = tensor_hash() if edited and target.origin is not None and known is None else None
        self._new = tensor_hash() if edited or known is None else None

    def update(self, old: memoryview, new: memoryview) -> None:
        """Take in the next bytes."""
        if self._old is not None:
            self._old.update(old)
        if self._new is not None:
            self._new.update(new)

    def finish(self) -> None:
        """There are no more bytes."""
        if self._new is not None:
            self.after = self._new.hexdigest()
        if self.before is None:
            self.before = self._old.hexdigest() if self._old is not None else self.after
        self._old = self._new = None


@dataclass(frozen=True)
class Head:
    """The first bytes of a file."""

    data: bytes
    copied: bool = False

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return len(self.data)

    def fill(self, old: memoryview, new: memoryview) -> None:  # noqa: ARG002  (there is nothing old)
        """Write them."""
        new[:] = self.data

    def digest(self, old: memoryview, new: memoryview) -> None:
        """They belong to no tensor."""


@dataclass(frozen=True)
class Part:
    """Bytes of one tensor: `nbytes` from `offset` on, copied, or rows that `edit` computes."""

    digests: Digests
    sources: Sources
    edit: Edit | None
    offset: int
    nbytes: int

    @property
    def copied(self) -> bool:
        """Whether they are as in the base."""
        return self.edit is None

    def fill(self, old: memoryview, new: memoryview) -> None:
        """Read or compute them. Raises CheckpointError, PatchError where one is not finite."""
        target = self.digests.target
        if self.edit is not None:
            self._compute(self.edit, target, old, new)
        elif target.origin is not None:
            self.sources.read(target.origin, self.offset, new)
        else:
            raise ValueError(f"{target.entry.name} has neither an origin nor an edit")

    def digest(self, old: memoryview, new: memoryview) -> None:
        """Take them into the tensor's digests."""
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
        aligned = new if (entry.start + self.offset) % _width(entry) == 0 else memoryview(bytearray(self.nbytes))
        row, out = self.offset // _row_bytes(entry), _rows(aligned, entry, edit)
        if (
            not edit.rows(before, row, out, _scratch(edit, self.nbytes // _width(entry))) <= LARGEST[entry.dtype]
        ):  # also when it is NaN
            self._refuse(target, before)
        if aligned is not new:
            new[:] = aligned

    def _refuse(self, target: Target, before: Any) -> NoReturn:
        """Say that the sum is not finite, or that the base was not."""
        from portllm.algebra.sums import as_array, largest

        name, dtype = target.entry.name, target.entry.dtype
        where = target.origin[0].path if target.origin is not None else self.sources.path
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
) -> Iterator[Head | Part]:
    """The pieces of a file in order. Reads the patch's factors, and old rows for edits that survey them first.

    `on_torch` is called before torch computes.
    """
    yield from (Head(file.head[at : at + PIECE_BYTES]) for at in range(0, len(file.head), PIECE_BYTES))
    for target in file.targets:
        digests = Digests(target, known.get(target.origin[1]) if target.origin is not None else None)
        edit = target.edit() if target.edit is not None else None
        if edit is not None and not _takes_arrays(edit):
            on_torch()
        if edit is not None and edit.surveys:
            _survey(edit, target, sources)
        for offset, nbytes in _spans(target):
            yield Part(digests, sources, edit, offset, nbytes)


def packed(pieces: Iterable[Head | Part], capacity: int) -> Iterator[list[Head | Part]]:
    """Consecutive pieces in groups that fit into a buffer of `capacity` together, or of one."""
    group: list[Head | Part] = []
    free = capacity
    for piece in pieces:
        if group and room(piece.nbytes) > free:
            yield group
            group, free = [], capacity
        group.append(piece)
        free -= room(piece.nbytes)
    if group:
        yield group


def largest_piece(file: TargetFile) -> int:
    """Bytes of the buffer that every piece of the file fits into."""
    return max(
        (room(max(PIECE_BYTES, _row_bytes(t.entry))) for t in file.targets if t.edit is not None), default=PIECE_BYTES
    )


def _spans(target: Target) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of a tensor's pieces; whole rows where it is edited. An empty tensor has one."""
    entry, step = target.entry, PIECE_BYTES
    if target.edit is not None:
        step = max(1, PIECE_BYTES // _row_bytes(entry)) * _row_bytes(entry)
    for offset in range(0, max(1, entry.nbytes), step):
        yield offset, min(step, entry.nbytes - offset)


def _survey(edit: Edit, target: Target, sources: Sources) -> None:
    if target.origin is None:
        raise ValueError(f"{target.entry.name}: an edit that surveys the old tensor was given none")
    for offset, nbytes in _spans(target):
        buffer = memoryview(bytearray(nbytes))
        sources.read(target.origin, offset, buffer)
        old = _rows(buffer, target.entry, edit)
        edit.survey(old, offset // _row_bytes(target.entry), _scratch(edit, nbytes // _width(target.entry)))


def _takes_arrays(edit: Edit) -> bool:
    """Whether an edit computes with numpy's arrays: then torch, which takes long to import, is not needed."""
    return getattr(edit, "arrays", False)


def _rows(buffer: memoryview, entry: TensorEntry, edit: Edit) -> Any:
    """Whole rows of a tensor, seen as (rows, columns), in the memory of `buffer`."""
    if _takes_arrays(edit):
        import numpy

        return numpy.frombuffer(buffer, ARRAY_DTYPES[entry.dtype]).reshape(-1, _columns(entry))
    import torch

    return torch.frombuffer(buffer, dtype=getattr(torch, TORCH_DTYPES[entry.dtype])).view(-1, _columns(entry))


def _columns(entry: TensorEntry) -> int:
    return entry.shape[-1] if entry.shape else 1


def _width(entry: TensorEntry) -> int:
    return BITS[entry.dtype] // 8


def _row_bytes(entry: TensorEntry) -> int:
    return max(1, _columns(entry) * _width(entry))


def _scratch(edit: Edit, elements: int) -> Any:
    """This thread's work space for edits by torch."""
    if _takes_arrays(edit):
        return None
    from portllm.algebra.lora import Scratch

    kept: Scratch | None = getattr(_OWN, "scratch", None)
    if kept is None or kept.elements < elements:
        kept = _OWN.scratch = Scratch(elements)
    return kept
