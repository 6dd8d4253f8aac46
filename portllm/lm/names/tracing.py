"""Follow what transformers' conversions do to a checkpoint on shapes alone, without the tensors.

transformers loads some checkpoints through a chain of operations (stack the experts, concatenate gate and up, …).
Those run here unchanged, on `Traced` objects that record where each of their blocks is on disk. Only the torch
functions below are followed, so an operation that does anything else (reshape, arithmetic, reading values) raises an
error instead of a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from portllm.checkpoint.base.layout import StoredBlock

Span = tuple[int, int]


class UntraceableError(Exception):
    """An operation whose result is not blocks of tensors on disk."""


@dataclass(frozen=True)
class TracedBlock:
    """A block of an array: `at` in the array, `of` in `tensor`; axes[i] is the axis of the tensor that array axis i is.

    An axis made by stacking is None in `axes`, and `at` is one wide there.
    """

    tensor: str
    at: tuple[Span, ...]
    of: tuple[Span, ...]
    axes: tuple[int | None, ...]

    def shifted(self, dim: int, by: int) -> TracedBlock:
        """Return the same block, `by` further along axis `dim` of the array."""
        start, stop = self.at[dim]
        return TracedBlock(self.tensor, _with(self.at, dim, (start + by, stop + by)), self.of, self.axes)

    def within(self, dim: int, span: Span) -> TracedBlock | None:
        """Return what of the block is inside `span` of axis `dim`, or None. Positions stay the array's."""
        start, stop = self.at[dim]
        first, last = max(start, span[0]), min(stop, span[1])
        if first >= last:
            return None
        axis, of = self.axes[dim], self.of
        if axis is not None:
            offset = of[axis][0] - start
            of = _with(of, axis, (first + offset, last + offset))
        return TracedBlock(self.tensor, _with(self.at, dim, (first, last)), of, self.axes)

    def part(self) -> StoredBlock:
        """Return the block for a layout. Raises UntraceableError when more than the last two axes are swapped."""
        order = [axis for axis in self.axes if axis is not None]
        plain = list(range(len(self.of)))
        if order not in (plain, swapped := [*plain[:-2], *plain[:-3:-1]]):
            raise UntraceableError("Transpose")
        at = tuple(span if axis is not None else span[0] for span, axis in zip(self.at, self.axes, strict=True))
        return StoredBlock(self.tensor, at, self.of, transposed=order != plain and order == swapped)


class Traced:
    """An array whose elements are on disk: its shape, and the blocks that cover each element once."""

    def __init__(self, shape: Sequence[int], blocks: Sequence[TracedBlock]) -> None:
        self.shape = tuple(shape)
        self.blocks = tuple(blocks)

    @classmethod
    def whole(cls, tensor: str, shape: Sequence[int]) -> Traced:
        """Return a tensor on disk as it is."""
        spans = tuple((0, n) for n in shape)
        return cls(shape, (TracedBlock(tensor, spans, spans, tuple(range(len(spans)))),))

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        _types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one of FUNCTIONS where torch receives a Traced. Raises UntraceableError for any other function."""
        import torch

        name = getattr(function, "__name__", "")
        if name not in FUNCTIONS or function is not getattr(torch, name):
            raise UntraceableError(name)
        return FUNCTIONS[name](*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def size(self, dim: int) -> int:
        """Return the length of axis `dim`."""
        return self.shape[dim]

    def contiguous(self) -> Traced:
        """Return itself: the order in memory has no meaning on disk."""
        return self

    def squeeze(self, dim: int) -> Traced:
        """Drop axis `dim` of length 1, made by stacking. Raises UntraceableError when it is an axis on disk."""
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        if any(block.axes[dim] is not None for block in self.blocks):
            raise UntraceableError("squeeze")
        blocks = [TracedBlock(b.tensor, _without(b.at, dim), b.of, _without(b.axes, dim)) for b in self.blocks]
        return Traced(_without(self.shape, dim), blocks)

    def narrow(self, dim: int, span: Span) -> Traced:
        """Return rows [start, stop) of axis `dim`."""
        kept = [part.shifted(dim, -span[0]) for block in self.blocks if (part := block.within(dim, span))]
        return Traced(_with(self.shape, dim, span[1] - span[0]), kept)

    def parts(self) -> tuple[StoredBlock, ...]:
        """Return where it is on disk. Raises UntraceableError."""
        return tuple(block.part() for block in self.blocks)


def _chunk(tensor: Traced, chunks: int, dim: int = 0) -> tuple[Traced, ...]:
    """Split as torch.chunk does: into pieces of the same length, the last may be shorter."""
    return _split(tensor, math.ceil(tensor.shape[dim] / chunks), dim)


def _split(tensor: Traced, sizes: int | Sequence[int], dim: int = 0) -> tuple[Traced, ...]:
    dim %= tensor.ndim
    total = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
    if sum(sizes) != total:
        raise UntraceableError("split")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(tensor.narrow(dim, (start, start + size)) for start, size in zip(starts, sizes, strict=True))


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    dim %= tensors[0].ndim
    if len({_without(tensor.shape, dim) for tensor in tensors}) != 1:
        raise UntraceableError("cat")
    blocks: list[TracedBlock] = []
    length = 0
    for tensor in tensors:
        blocks += [block.shifted(dim, length) for block in tensor.blocks]
        length += tensor.shape[dim]
    return Traced(_with(tensors[0].shape, dim, length), blocks)


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    dim %= tensors[0].ndim + 1
    if len({tensor.shape for tensor in tensors}) != 1:
        raise UntraceableError("stack")
    blocks = [
        TracedBlock(b.tensor, _insert(b.at, dim, (i, i + 1)), b.of, _insert(b.axes, dim, None))
        for i, tensor in enumerate(tensors)
        for b in tensor.blocks
    ]
    return Traced(_insert(tensors[0].shape, dim, len(tensors)), blocks)


def _transpose(tensor: Traced, dim0: int, dim1: int) -> Traced:
    order = list(range(tensor.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    blocks = [
        TracedBlock(b.tensor, tuple(b.at[i] for i in order), b.of, tuple(b.axes[i] for i in order))
        for b in tensor.blocks
    ]
    return Traced([tensor.shape[i] for i in order], blocks)


# the torch functions that are followed, by name
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "chunk": _chunk, "split": _split, "cat": _cat, "stack": _stack, "transpose": _transpose,
}  # fmt: skip


def _with(values: tuple[Any, ...], at: int, value: object) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _without(values: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    return values[:at] + values[at + 1 :]


def _insert(values: tuple[Any, ...], at: int, value: object) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at:])
