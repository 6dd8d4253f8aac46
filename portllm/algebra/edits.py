"""Edits of one tensor, row by row: every way a patch changes a weight, with one rounding to the weight's dtype.

A tensor is seen as (rows, columns): leading axes flattened, a vector as one row. Each edit is written twice: `rows`
works in blocks and is what a port runs; `exact` is the formula over the whole tensor in float64, what `verify`
compares with. Plain LoRA, the common case, is `portllm.algebra.sums.AddLora`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from portllm.algebra.lora import Scratch, round_once

ReadRows = Callable[[int, int], Tensor]


class Edit(Protocol):
    """How the rows of a changed tensor are computed from the old ones."""

    surveys: bool
    """Whether `survey` must see every old row before the first call of `rows`."""

    def survey(self, old: Tensor, row: int, scratch: Scratch) -> None:
        """Look at the old rows (count, columns) from `row` on; called in order, over the whole tensor."""

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:
        """Write the new rows (count, columns) from `row` on into `out`, in its dtype.

        `old` holds the base's rows, or None where nothing of the base is read. Returns an upper bound of the largest
        absolute value written, before it was rounded or after, or NaN where one is.
        """

    def exact(self, old: Tensor | None) -> Tensor:
        """The whole new tensor (rows, columns) in float64, not rounded, from the whole old one in float64."""


class Plain:
    """An edit that needs no survey."""

    surveys = False

    def survey(self, old: Tensor, row: int, scratch: Scratch) -> None:
        """Nothing to see beforehand."""


class Dora:
    """m ⊙ (W + Δ) / ‖W + Δ‖, the norm over each output's inputs: weight-decomposed LoRA, arXiv:2402.09353, eq. 5.

    W is the base it is put onto, so the norm is that base's: what PEFT's forward computes.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, magnitude: Tensor, *, outputs: int) -> None:
        """a (r, columns), b (rows, r), magnitude (outputs,); `outputs` is their axis: 0 the rows, 1 the columns."""
        self._a, self._b, self._magnitude = a.double(), b.double() * scale, magnitude.double().reshape(-1)
        self.surveys = outputs == 1
        self._squares = torch.zeros(a.shape[1], dtype=torch.float64)

    def survey(self, old: Tensor, row: int, scratch: Scratch) -> None:
        """Sum the squares of each column."""
        total = self._sum(old, row, scratch)
        self._squares += total.square_().sum(dim=0)

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:
        """The rows' sums, each output scaled to its magnitude."""
        total = self._sum(_given(old), row, scratch)
        if self.surveys:
            total *= self._magnitude / self._squares.sqrt()
        else:
            total *= (self._magnitude[row : row + len(total)] / total.norm(dim=1)).unsqueeze(1)
        return _put(out, total)

    def exact(self, old: Tensor | None) -> Tensor:
        """The formula as it stands in the paper."""
        total = _given(old) + self._b @ self._a
        axis = 0 if self.surveys else 1
        norm: Tensor = torch.linalg.vector_norm(total, dim=axis, keepdim=True)
        return self._magnitude.unsqueeze(axis) * total / norm

    def _sum(self, old: Tensor, row: int, scratch: Scratch) -> Tensor:
        total = scratch.like(old, torch.float64).copy_(old)
        return torch.addmm(total, self._b[row : row + len(old)], self._a, out=total)


class Replace(Plain):
    """Another tensor in the old one's place: a module saved whole (modules_to_save), a trained bias."""

    def __init__(self, read: ReadRows) -> None:
        """`read(row, count)` gives the new rows (count, columns) in any floating dtype."""
        self._read = read

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:  # noqa: ARG002
        """The new rows, rounded once where the dtypes differ."""
        return _put(out, self._read(row, len(out)))

    def exact(self, old: Tensor | None) -> Tensor:  # noqa: ARG002
        """The new tensor itself."""
        return self._read(0, -1).double()


class ReplaceRows(Plain):
    """Single rows replaced, the rest as it was: trained token embeddings (trainable_token_indices)."""

    def __init__(self, rows: Mapping[int, Tensor]) -> None:
        """`rows` maps a row's index to its new values (columns,)."""
        self._rows = rows

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:  # noqa: ARG002
        """The old rows with the replaced ones among them."""
        out.copy_(_given(old))
        for i in range(len(out)):
            if row + i in self._rows:
                _put(out[i : i + 1], self._rows[row + i].reshape(1, -1))
        return _size(out)

    def exact(self, old: Tensor | None) -> Tensor:
        """The old tensor with the replaced rows."""
        new = _given(old).clone()
        for index, values in self._rows.items():
            new[index] = values.double()
        return new


class AddVector(Plain):
    """bias + scale · v: the bias of lora_B (lora_bias)."""

    def __init__(self, values: Tensor, scale: float) -> None:
        """`values` (n,) in any floating dtype."""
        self._step = values.double().reshape(1, -1) * scale

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:  # noqa: ARG002
        """The one row there is."""
        return _put(out, _given(old).double() + self._step)

    def exact(self, old: Tensor | None) -> Tensor:
        """The sum."""
        return _given(old) + self._step


def _given(old: Tensor | None) -> Tensor:
    if old is None:
        raise ValueError("this edit changes a tensor of the base, and none was given")
    return old


def _put(out: Tensor, values: Tensor) -> float:
    """Round `values` once into `out`; returns the largest absolute value, NaN where there is one."""
    out.copy_(values if values.dtype == out.dtype else round_once(values.double(), out.dtype))
    return _size(out)


def _size(out: Tensor) -> float:
    """The largest absolute value, NaN where there is one."""
    if out.numel() == 0:
        return 0.0
    low, high = float(out.amin()), float(out.amax())
    return max(-low, high) if low == low else low
