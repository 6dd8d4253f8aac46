"""Edits of one tensor, row by row: every way a patch changes a weight, with one rounding to the weight's dtype.

A tensor is viewed as (rows, columns): leading axes are flattened, a vector is one row. Each edit is written twice:
`rows` works in blocks, and a port runs it; `exact` is the formula over the complete tensor in float64, and `verify`
compares with it. Plain LoRA, the common case, is `portllm.algebra.sums.AddLora`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from portllm.algebra.lora import Scratch, round_once

ReadRows = Callable[[int, int], Tensor]


class Edit(Protocol):
    """Computes the rows of a changed tensor from the old rows."""

    surveys: bool
    """Whether `survey` must read every old row before the first call of `rows`."""

    def survey(self, old: Tensor, row: int, scratch: Scratch) -> None:
        """Read the old rows (count, columns) from `row` on; called in order, over the complete tensor."""

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:
        """Write the new rows (count, columns) from `row` on into `out`, in its dtype.

        `old` contains the base's rows, or is None where nothing of the base is read. Returns an upper bound of the
        largest absolute value written, before or after rounding, or NaN where a value is NaN.
        """

    def exact(self, old: Tensor | None) -> Tensor:
        """Return the complete new tensor (rows, columns) in float64, not rounded; `old` is complete, in float64."""


class Plain:
    """An edit that needs no survey."""

    surveys = False

    def survey(self, old: Tensor, row: int, scratch: Scratch) -> None:
        """Do nothing: `rows` needs no earlier pass over the tensor."""


class Dora:
    """m ⊙ (W + Δ) / ‖W + Δ‖, the norm over each output's inputs: weight-decomposed LoRA, arXiv:2402.09353, eq. 5.

    W is the weight of the base that the patch is ported onto, so the norm is that base's, as in PEFT's forward.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, magnitude: Tensor, *, outputs: int) -> None:
        """Take a (r, columns), b (rows, r), magnitude (outputs,); `outputs` is their axis: 0 rows, 1 columns."""
        self._a, self._b, self._magnitude = a.double(), b.double() * scale, magnitude.double().reshape(-1)
        self.surveys = outputs == 1
        self._squares = torch.zeros(a.shape[1], dtype=torch.float64)

    def survey(self, old: Tensor, row: int, scratch: Scratch) -> None:
        """Add the squares of these rows to the sum of each column."""
        total = self._sum(old, row, scratch)
        self._squares += total.square_().sum(dim=0)

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:
        """Write the sums of these rows, each output scaled to its magnitude."""
        total = self._sum(_given(old), row, scratch)
        if self.surveys:
            total *= self._magnitude / self._squares.sqrt()
        else:
            total *= (self._magnitude[row : row + len(total)] / total.norm(dim=1)).unsqueeze(1)
        return _put(out, total)

    def exact(self, old: Tensor | None) -> Tensor:
        """Return the result of the formula in the paper."""
        total = _given(old) + self._b @ self._a
        axis = 0 if self.surveys else 1
        norm: Tensor = torch.linalg.vector_norm(total, dim=axis, keepdim=True)
        return self._magnitude.unsqueeze(axis) * total / norm

    def _sum(self, old: Tensor, row: int, scratch: Scratch) -> Tensor:
        total = scratch.like(old, torch.float64).copy_(old)
        return torch.addmm(total, self._b[row : row + len(old)], self._a, out=total)


class Replace(Plain):
    """Replaces the old tensor by a new one: a module saved completely (modules_to_save), or a trained bias."""

    def __init__(self, read: ReadRows) -> None:
        """Take `read(row, count)`, which returns the new rows (count, columns) in any floating dtype."""
        self._read = read

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:  # noqa: ARG002
        """Write the new rows, rounded once where the dtypes differ."""
        return _put(out, self._read(row, len(out)))

    def exact(self, old: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return the new tensor itself."""
        return self._read(0, -1).double()


class ReplaceRows(Plain):
    """Replaces single rows and keeps all other rows: trained token embeddings (trainable_token_indices)."""

    def __init__(self, rows: Mapping[int, Tensor]) -> None:
        """Take `rows`, which maps a row's index to its new values (columns,)."""
        self._rows = rows

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:  # noqa: ARG002
        """Write the old rows, and the new values of each row that is replaced."""
        out.copy_(_given(old))
        for i in range(len(out)):
            if row + i in self._rows:
                _put(out[i : i + 1], self._rows[row + i].reshape(1, -1))
        return _size(out)

    def exact(self, old: Tensor | None) -> Tensor:
        """Return the old tensor with the replaced rows."""
        new = _given(old).clone()
        for index, values in self._rows.items():
            new[index] = values.double()
        return new


class AddVector(Plain):
    """Adds scale · v to a bias: the bias of lora_B (lora_bias)."""

    def __init__(self, values: Tensor, scale: float) -> None:
        """Take `values` (n,) in any floating dtype."""
        self._step = values.double().reshape(1, -1) * scale

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:  # noqa: ARG002
        """Write the sum; a vector has one row."""
        return _put(out, _given(old).double() + self._step)

    def exact(self, old: Tensor | None) -> Tensor:
        """Return the sum."""
        return _given(old) + self._step


def _given(old: Tensor | None) -> Tensor:
    if old is None:
        raise ValueError("this edit changes a tensor of the base: expected the old rows, found none")
    return old


def _put(out: Tensor, values: Tensor) -> float:
    """Round `values` once into `out`; return the largest absolute value, or NaN where a value is NaN."""
    out.copy_(values if values.dtype == out.dtype else round_once(values.double(), out.dtype))
    return _size(out)


def _size(out: Tensor) -> float:
    """Return the largest absolute value, or NaN where a value is NaN."""
    if out.numel() == 0:
        return 0.0
    low, high = float(out.amin()), float(out.amax())
    return max(-low, high) if low == low else low
