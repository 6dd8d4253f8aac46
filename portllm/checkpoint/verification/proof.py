"""A ported directory against its base and patch: what did not change is the base's, and what did is computed again.

The second computation shares no code with the streaming writer: a whole tensor in float64 by the edit's own formula
(`Edit.exact`), rounded once. So a port is proven by arithmetic, not by running it twice.
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
# old and new in float64, an update, and what they are made of
BYTES_PER_ELEMENT = 40
# two orders of summing in float64 may fall on the two sides of a rounding boundary: then either neighbour is right
FLOAT64_DOUBT = 2.0**-48


@dataclass(frozen=True)
class TensorSample:
    """Which changed tensors to compute again: `count` of them by `seed`, the largest always, or all of them."""

    count: int = 8
    everything: bool = False
    seed: int = 0

    def choose(self, sizes: Mapping[str, int]) -> list[str]:
        """Return the names, sorted, of the tensors to take from `sizes` (name → number of elements)."""
        if self.everything or self.count >= len(sizes):
            return sorted(sizes)
        largest = min(sizes, key=lambda name: (-sizes[name], name))
        others = sorted(sizes.keys() - {largest})
        return sorted([largest, *random.Random(self.seed).sample(others, self.count - 1)])  # noqa: S311 - no secret


@dataclass(frozen=True)
class Proof:
    """What was proven: tensors found identical to the base's (or patch's), and those computed again, by name.

    `too_large` names the changed tensors that this machine's memory cannot hold in float64; they were left out.
    """

    identical: int
    recomputed: tuple[str, ...]
    changed: int
    too_large: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpectedTensors:
    """Written tensors next to those that the port would write again; raises VerificationError at the first difference.

    `written` and `expected` go by tensor name; an expected tensor has the name of the file it belongs to. `whose` names
    the owner of the untouched tensors, for people.
    """

    folder: Path
    written: Mapping[str, TensorEntry]
    expected: Mapping[str, tuple[str, Target]]
    whose: str

    @classmethod
    def of(cls, written: Sequence[Header], files: Sequence[TargetFile], folder: Path, whose: str) -> ExpectedTensors:
        """From the headers in `folder` and the files a port would write."""
        entries = {name: entry for header in written for name, entry in header.tensors.items()}
        expected = {target.entry.name: (file.path.name, target) for file in files for target in file.targets}
        return cls(folder, entries, dict(sorted(expected.items())), whose)

    def recomputable(self) -> dict[str, int]:
        """Return the number of elements of each tensor that the patch changes, by name."""
        edited = {name: target for name, (_, target) in self.expected.items() if target.edit is not None}
        return {name: math.prod(target.entry.shape) for name, target in edited.items()}

    def nbytes(self, chosen: Sequence[str]) -> int:
        """Return the number of bytes that `prove` counts."""
        return sum(t.entry.nbytes for name, (_, t) in self.expected.items() if t.edit is None or name in chosen)

    def prove(self, chosen: Sequence[str], meter: ByteMeter) -> Proof:
        """Compare what is not edited byte for byte, and compute the `chosen` tensors again; headers were checked."""
        same = [(name, t.origin) for name, (_, t) in self.expected.items() if t.edit is None and t.origin is not None]
        for name, origin in same:
            if not same_bytes(self.written[name], origin, meter):
                raise self._wrong(name, f"expected the {self.whose}'s own bytes ({origin.name}), found others")
        for name in chosen:
            self._recompute(name, self.expected[name][1])
            meter.add(self.written[name].nbytes)
        return Proof(len(same), tuple(chosen), len(self.recomputable()))

    def check_headers(self) -> None:
        """Prove that the tensors are the expected ones, each in its file and of its dtype and shape, and no others."""
        wanted = {name: _kind(t.entry, file) for name, (file, t) in self.expected.items()}
        found = {name: _kind(entry, entry.path.name) for name, entry in self.written.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise self._wrong(name, f"expected {wanted.get(name, 'none')}, found {found.get(name, 'none')}")

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
            found, expected = new.reshape(-1)[at], round_once(exact.reshape(-1)[at : at + 1], new.dtype)[0]
            where = _index(at, target.entry.shape)
            raise self._wrong(name, f"element {where} is {float(found):.9g}, expected {float(expected):.9g}")

    def _wrong(self, name: str, what: str) -> VerificationError:
        path = self.written[name].path if name in self.written else self.folder
        return VerificationError(f"{path}: tensor {name}: {what}; it is not what base and patch make, port again")


def first_difference(new: torch.Tensor, exact: torch.Tensor, old: torch.Tensor | None) -> int | None:
    """Return the flat index of the first element of `new` that is not `exact` (float64) rounded once, or None.

    All three are of one shape, or there is no `old`. Compared bit by bit. Where bits differ, an element still passes
    when the exact value lies so near a rounding boundary that float64 itself cannot tell the side.
    """
    import torch

    from portllm.algebra.lora import round_once

    expected = round_once(exact.contiguous(), new.dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[new.element_size()]
    wrong = (new.contiguous().view(bits) != expected.view(bits)) | ~new.isfinite()
    unsure = wrong.reshape(-1).nonzero().reshape(-1)
    if len(unsure) == 0:
        return None
    value, found = exact.reshape(-1)[unsure], new.reshape(-1)[unsure]
    old = torch.zeros_like(exact) if old is None else old
    before, step = old.reshape(-1)[unsure], float((exact - old).abs().max())
    doubt = FLOAT64_DOUBT * (value.abs() + before.abs() + step)
    low, high = round_once(value - doubt, new.dtype), round_once(value + doubt, new.dtype)
    fails = ~((found >= low) & (found <= high))
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
    """Return a tensor as an edit sees it: (rows, columns), leading axes flattened, a vector as one row."""
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
