"""A ported directory against its base and patch: unchanged bytes are compared, changed tensors are computed again.

The second computation shares no code with the streaming writer: it computes a complete tensor in float64 by the edit's
own formula (`Edit.exact`), and rounds once. So arithmetic proves a port, not a second run of the same code.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.checkpoint.files.headers import Header
from portllm.checkpoint.files.progress import ByteMeter
from portllm.checkpoint.files.reading import read_exactly
from portllm.checkpoint.files.tensors import TensorEntry
from portllm.checkpoint.writing.targets import Target, TargetFile
from portllm.errors import VerificationError

if TYPE_CHECKING:
    import torch

PIECE_BYTES = 1 << 20
# old and new in float64, an update, and their inputs
BYTES_PER_ELEMENT = 40
# two orders of summation in float64 can be on two sides of a rounding boundary: then both neighbours are right
FLOAT64_DOUBT = 2.0**-48


@dataclass(frozen=True)
class TensorSample:
    """The changed tensors to compute again: the largest and others chosen by `seed`, `count` in all, or every one."""

    count: int = 8
    everything: bool = False
    seed: int = 0

    def choose(self, sizes: Mapping[str, int]) -> list[str]:
        """Return the names, sorted, of the tensors to take from `sizes` (name → number of elements)."""
        if self.everything or self.count >= len(sizes):
            return sorted(sizes)
        largest = min(sizes, key=lambda name: (-sizes[name], name))
        rest = sorted(sizes.keys() - {largest})
        return sorted([largest, *random.Random(self.seed).sample(rest, self.count - 1)])  # noqa: S311 - no secret


@dataclass(frozen=True)
class Proof:
    """The result of a proof: the count of tensors identical to the base's (or patch's), the names of those recomputed.

    `too_large` names the changed tensors that do not fit into this machine's memory in float64; they were left out.
    """

    identical: int
    recomputed: tuple[str, ...]
    changed: int
    too_large: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpectedTensors:
    """Written tensors and those that the port would write; a check raises VerificationError at the first difference.

    `written` and `expected` are by tensor name; an expected tensor has the name of its file. `whose` names the owner of
    the unchanged tensors, for people.
    """

    folder: Path
    written: Mapping[str, TensorEntry]
    expected: Mapping[str, tuple[str, Target]]
    whose: str

    @classmethod
    def of(cls, written: Sequence[Header], files: Sequence[TargetFile], folder: Path, whose: str) -> ExpectedTensors:
        """Return the tensors from the headers in `folder` and from the files that a port would write."""
        entries = {name: entry for header in written for name, entry in header.tensors.items()}
        expected = {target.entry.name: (file.path.name, target) for file in files for target in file.targets}
        return cls(folder, entries, dict(sorted(expected.items())), whose)

    def recomputable(self) -> dict[str, int]:
        """Return the number of elements of each tensor that the patch changes, by name."""
        edited = {name: target for name, (_, target) in self.expected.items() if target.edit is not None}
        return {name: math.prod(target.entry.shape) for name, target in edited.items()}

    def nbytes(self, chosen: Sequence[str]) -> int:
        """Return the number of bytes that `prove` adds to its meter."""
        return sum(t.entry.nbytes for name, (_, t) in self.expected.items() if t.edit is None or name in chosen)

    def prove(self, chosen: Sequence[str], meter: ByteMeter) -> Proof:
        """Compare unedited tensors byte for byte, and compute the `chosen` ones again; call `check_headers` before."""
        copies = [(name, t.origin) for name, (_, t) in self.expected.items() if t.edit is None and t.origin is not None]
        for name, origin in copies:
            if not same_bytes(self.written[name], origin, meter):
                raise self._wrong(name, f"expected the {self.whose}'s own bytes ({origin.name}), found others")
        for name in chosen:
            self._recompute(name, self.expected[name][1])
            meter.add(self.written[name].nbytes)
        return Proof(len(copies), tuple(chosen), len(self.recomputable()))

    def check_headers(self) -> None:
        """Prove that the tensors are exactly the expected ones, each of its dtype and shape and in its file."""
        expected = {name: _kind(t.entry, file) for name, (file, t) in self.expected.items()}
        written = {name: _kind(entry, entry.path.name) for name, entry in self.written.items()}
        for name in sorted(expected.keys() | written.keys()):
            if expected.get(name) != written.get(name):
                raise self._wrong(name, f"expected {expected.get(name, 'none')}, found {written.get(name, 'none')}")

    def _recompute(self, name: str, target: Target) -> None:
        from portllm.algebra.lora import round_once

        if target.edit is None:
            raise ValueError(f"{name} is not edited")
        new = _rows_of(self.written[name])
        old = _rows_of(target.origin).double() if target.origin is not None else None
        exact = target.edit().exact(old)
        if new.shape != exact.shape:
            raise self._wrong(name, f"seen as rows, expected {tuple(exact.shape)}, found {tuple(new.shape)}")
        at = first_difference(new, exact, old)
        if at is not None:
            actual, expected = new.reshape(-1)[at], round_once(exact.reshape(-1)[at : at + 1], new.dtype)[0]
            index = _index(at, target.entry.shape)
            raise self._wrong(name, f"element {index} is {float(actual):.9g}, expected {float(expected):.9g}")

    def _wrong(self, name: str, what: str) -> VerificationError:
        path = self.written[name].path if name in self.written else self.folder
        return VerificationError(f"{path}: tensor {name}: {what}; it is not what base and patch make, port again")


def first_difference(new: torch.Tensor, exact: torch.Tensor, old: torch.Tensor | None) -> int | None:
    """Return the flat index of the first element of `new` that is not `exact` (float64) rounded once, or None.

    All three have one shape, or `old` is None. Elements are compared bit by bit. Where bits differ, an element still
    passes when the exact value is so close to a rounding boundary that float64 cannot decide the side.
    """
    import torch

    from portllm.algebra.lora import round_once

    expected = round_once(exact.contiguous(), new.dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[new.element_size()]
    differs = (new.contiguous().view(bits) != expected.view(bits)) | ~new.isfinite()
    unsure = differs.reshape(-1).nonzero().reshape(-1)
    if len(unsure) == 0:
        return None
    value, written = exact.reshape(-1)[unsure], new.reshape(-1)[unsure]
    old = torch.zeros_like(exact) if old is None else old
    before, step = old.reshape(-1)[unsure], float((exact - old).abs().max())
    doubt = FLOAT64_DOUBT * (value.abs() + before.abs() + step)
    low, high = round_once(value - doubt, new.dtype), round_once(value + doubt, new.dtype)
    fails = ~((written >= low) & (written <= high))
    return int(unsure[fails][0]) if bool(fails.any()) else None


def same_bytes(left: TensorEntry, right: TensorEntry, meter: ByteMeter) -> bool:
    """Return whether two tensors on disk have the same bytes, read in pieces."""
    if left.nbytes != right.nbytes:
        return False
    a, b = memoryview(bytearray(PIECE_BYTES)), memoryview(bytearray(PIECE_BYTES))
    with left.path.open("rb", buffering=0) as first, right.path.open("rb", buffering=0) as second:
        for at in range(0, left.nbytes, PIECE_BYTES):
            count = min(PIECE_BYTES, left.nbytes - at)
            read_exactly(first.fileno(), a[:count], left.start + at, left.path)
            read_exactly(second.fileno(), b[:count], right.start + at, right.path)
            if a[:count] != b[:count]:
                return False
            meter.add(count)
    return True


def _rows_of(entry: TensorEntry) -> torch.Tensor:
    """Return a tensor in the view of an edit: (rows, columns), leading axes flattened, a vector as one row."""
    tensor = entry.read()
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(-1, tensor.shape[-1])


def fitting(sizes: Mapping[str, int], memory_bytes: int) -> dict[str, int]:
    """Return the tensors of `sizes` (name → elements) whose computation in float64 fits into `memory_bytes`."""
    return {name: count for name, count in sizes.items() if count * BYTES_PER_ELEMENT <= memory_bytes}


def _index(at: int, shape: tuple[int, ...]) -> str:
    index: list[int] = []
    for length in reversed(shape):
        at, place = divmod(at, max(1, length))
        index.insert(0, place)
    return "[" + ", ".join(map(str, index)) + "]"


def _kind(entry: TensorEntry, file: str) -> str:
    return f"{entry.dtype} {'×'.join(map(str, entry.shape)) or 'scalar'} in {file}"
