"""A ported directory against its base and patch: what did not change is the base's, and what did is computed again.

The second computation shares no code with the streaming writer: a whole tensor in float64 by the edit's own formula
(`Edit.exact`), rounded once. So a port is proven by arithmetic, not by running it twice.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from portllm.checkpoint.headers import Header, TensorEntry
from portllm.checkpoint.plan import Change, Plan
from portllm.checkpoint.reader import Checkpoint, read_exactly
from portllm.checkpoint.writer import Meter
from portllm.errors import VerificationError

if TYPE_CHECKING:
    import torch

    from portllm.checkpoint.patch import Patch
    from portllm.checkpoint.records import PortRecord

PIECE_BYTES = 1 << 20
# old and new in float64, an update, and what they are made of
BYTES_PER_ELEMENT = 40
# two orders of summing in float64 may fall on the two sides of a rounding boundary: then either neighbour is right
FLOAT64_DOUBT = 2.0**-48

Place = tuple[Header, TensorEntry]


@dataclass(frozen=True)
class Sample:
    """Which changed tensors to compute again: `count` of them by `seed`, the largest always, or all of them."""

    count: int = 8
    everything: bool = False
    seed: int = 0

    def choose(self, sizes: Mapping[str, int]) -> list[str]:
        """Names, sorted, of the tensors to take from `sizes` (name → number of elements)."""
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
class Merged:
    """A merged output beside the plan of making it again; raises VerificationError at the first difference."""

    written: Checkpoint
    base: Checkpoint
    plan: Plan

    def check_headers(self) -> None:
        """The written checkpoint has the planned tensors, each of its planned dtype and shape, and no others."""
        expected = {name: (entry.dtype, entry.shape) for name, entry in self._base_entries().items()}
        expected.update({name: (change.dtype, change.shape) for name, change in self.plan.changes.items()})
        found = {name: (h.tensors[name].dtype, h.tensors[name].shape) for name, h in self.written.where.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise self._wrong(name, f"expected {_kind(expected.get(name))}, found {_kind(found.get(name))}")

    def identical(self) -> dict[str, Place]:
        """Name of each tensor that must hold a base tensor's very bytes → that tensor's place."""
        places = {name: (self.base.where[name], e) for name, e in self._base_entries().items()}
        for name, change in self.plan.changes.items():
            places.pop(name, None)
            if change.edit is None and change.origin is not None:
                places[name] = (self.base.where[change.origin], self.base.entry(change.origin))
        return dict(sorted(places.items()))

    def recomputable(self) -> dict[str, int]:
        """Name of each tensor that the patch changes → its number of elements."""
        return {name: math.prod(c.shape) for name, c in self.plan.changes.items() if c.edit is not None}

    def nbytes(self, chosen: Sequence[str]) -> int:
        """Bytes that `prove` will count."""
        same = sum(entry.nbytes for _, entry in self.identical().values())
        return same + sum(self.written.entry(name).nbytes for name in chosen if name in self.written.where)

    def prove(self, chosen: Sequence[str], meter: Meter) -> Proof:
        """Compare everything that is the base's, and compute the `chosen` tensors again."""
        self.check_headers()
        same = self.identical()
        for name, place in same.items():
            if not same_bytes(self._place(name), place, meter):
                raise self._wrong(name, f"expected the base's own bytes ({place[1].name}), found others")
        for name in chosen:
            self._recompute(name, self.plan.changes[name])
            meter.add(self.written.entry(name).nbytes)
        return Proof(len(same), tuple(chosen), len(self.recomputable()))

    def _recompute(self, name: str, change: Change) -> None:
        from portllm.algebra.lora import round_once

        if change.edit is None:
            raise ValueError(f"{name} is not computed")
        old = as_rows(self.base.read(change.origin)).double() if change.origin is not None else None
        exact = change.edit().exact(old)
        new = as_rows(self.written.read(name))
        at = first_difference(new, exact, old)
        if at is not None:
            expected = round_once(exact.reshape(-1)[at : at + 1], new.dtype)
            raise self._wrong(
                name,
                f"element {_index(at, change.shape)} is {_show(new.reshape(-1)[at])}, expected {_show(expected[0])}",
            )

    def _base_entries(self) -> dict[str, TensorEntry]:
        return {name: header.tensors[name] for name, header in self.base.where.items()}

    def _place(self, name: str) -> Place:
        return self.written.where[name], self.written.entry(name)

    def _wrong(self, name: str, what: str) -> VerificationError:
        file = self.written.where[name].path if name in self.written.where else self.written.path
        return VerificationError(f"{file}: tensor {name}: {what}; it is not what this base and patch make, port again")


@dataclass(frozen=True)
class Adapter:
    """An adapter output beside the patch it came from; raises VerificationError at the first difference."""

    written: Patch
    patch: Patch
    record: PortRecord

    def recomputable(self) -> dict[str, int]:
        """None: the factors are the patch's own."""
        return {}

    def nbytes(self, chosen: Sequence[str]) -> int:  # noqa: ARG002 - as Merged.nbytes
        """Bytes that `prove` will count."""
        return sum(entry.nbytes for entry in self.patch.header.tensors.values())

    def prove(self, chosen: Sequence[str], meter: Meter) -> Proof:  # noqa: ARG002 - as Merged.prove
        """Compare every factor, and what the config makes of them."""
        left, right = self.written.header, self.patch.header
        copies = {entry.name for entry in self.patch.saved.values()}
        expected = {name: entry for name, entry in right.tensors.items() if name not in copies}
        for name in sorted(expected.keys() | left.tensors.keys()):
            one, other = left.tensors.get(name), expected.get(name)
            kinds = [_kind((e.dtype, e.shape) if e else None) for e in (other, one)]
            if one is None or other is None or kinds[0] != kinds[1]:
                raise self._wrong(f"tensor {name}: expected {kinds[0]}, found {kinds[1]}")
            if not same_bytes((left, one), (right, other), meter):
                raise self._wrong(f"tensor {name}: expected the patch's own bytes, found others")
        self._check_scaling()
        return Proof(len(expected), (), 0)

    def _check_scaling(self) -> None:
        for module, pair in self.patch.modules.items():
            found, expected = self.written.modules[module].scaling, pair.scaling * self.record.scale
            if not math.isclose(found, expected, rel_tol=1e-12):
                raise self._wrong(f"scaling of {module}: expected {expected:g}, found {found:g}")

    def _wrong(self, what: str) -> VerificationError:
        return VerificationError(f"{self.written.header.path}: {what}; it is not what this patch makes, port again")


def first_difference(new: torch.Tensor, exact: torch.Tensor, old: torch.Tensor | None) -> int | None:
    """Flat index of the first element of `new` that is not `exact` (float64) rounded once to its dtype, or None.

    Compared bit by bit. Where bits differ, an element still passes when the exact value lies so near a rounding
    boundary that float64 itself cannot tell the side. Raises VerificationError where the shapes differ.
    """
    import torch

    from portllm.algebra.lora import round_once

    if new.shape != exact.shape:
        return 0
    expected = round_once(exact.contiguous(), new.dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[new.element_size()]
    wrong = (new.contiguous().view(bits) != expected.view(bits)) | ~new.isfinite()
    unsure = wrong.reshape(-1).nonzero().reshape(-1)
    if len(unsure) == 0:
        return None
    value, found = exact.reshape(-1)[unsure], new.reshape(-1)[unsure]
    before = torch.zeros_like(value) if old is None or old.shape != exact.shape else old.reshape(-1)[unsure]
    step = float((exact if old is None or old.shape != exact.shape else exact - old).abs().max())
    doubt = FLOAT64_DOUBT * (value.abs() + before.abs() + step)
    low, high = round_once(value - doubt, new.dtype), round_once(value + doubt, new.dtype)
    fails = ~((found >= low) & (found <= high))
    return int(unsure[fails][0]) if bool(fails.any()) else None


def same_bytes(one: Place, other: Place, meter: Meter) -> bool:
    """Whether two tensors on disk have the same bytes, read in pieces."""
    (left_header, left), (right_header, right) = one, other
    if left.nbytes != right.nbytes:
        return False
    a, b = memoryview(bytearray(PIECE_BYTES)), memoryview(bytearray(PIECE_BYTES))
    with left_header.path.open("rb", buffering=0) as first, right_header.path.open("rb", buffering=0) as second:
        for at in range(0, left.nbytes, PIECE_BYTES):
            count = min(PIECE_BYTES, left.nbytes - at)
            read_exactly(first.fileno(), a[:count], left.start + at, left_header.path)
            read_exactly(second.fileno(), b[:count], right.start + at, right_header.path)
            if a[:count] != b[:count]:
                return False
            meter.add(count)
    return True


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as an edit sees it: (rows, columns), leading axes flattened, a vector as one row."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(-1, tensor.shape[-1])


def fitting(sizes: Mapping[str, int], memory_bytes: int) -> dict[str, int]:
    """The tensors of `sizes` (name → elements) that can be computed whole in float64 within `memory_bytes`."""
    return {name: count for name, count in sizes.items() if count * BYTES_PER_ELEMENT <= memory_bytes}


def _index(at: int, shape: tuple[int, ...]) -> str:
    index: list[int] = []
    for length in reversed(shape):
        at, place = divmod(at, max(1, length))
        index.insert(0, place)
    return "[" + ", ".join(map(str, index)) + "]"


def _show(value: torch.Tensor) -> str:
    return f"{float(value):.9g}"


def _kind(found: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{found[0]} {'×'.join(map(str, found[1])) or 'scalar'}" if found else "none"
