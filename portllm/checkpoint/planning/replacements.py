"""A vocabulary that grew before training: the base's rows, and behind them the new ones, which the patch holds.

PEFT saves the whole resized embedding and head then (save_embedding_layers). Their first rows are the old base's, and
stay behind; those that no base has come along, trained (trainable_token_indices) or as they were initialised.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.checkpoint.adapter.factors import TokenRows
from portllm.checkpoint.base.checkpoint import read_rows
from portllm.checkpoint.files.headers import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

    from portllm.algebra.edits import Edit

Stored = tuple[Path, TensorEntry]


def grew(entry: TensorEntry, shape: tuple[int, ...]) -> bool:
    """Whether a saved copy has more rows than the base's tensor, and the same columns."""
    return len(entry.shape) == len(shape) == 2 and entry.shape[1] == shape[1] and entry.shape[0] > shape[0]


def first_rows(entry: TensorEntry, rows: int) -> TensorEntry:
    """The first `rows` rows of a matrix, as a tensor of its own."""
    length = entry.nbytes // max(1, entry.shape[0])
    return replace(entry, shape=(rows, *entry.shape[1:]), stop=entry.start + rows * length)


def extended(base: Stored, saved: Stored, tokens: TokenRows | None) -> Edit:
    """The grown tensor: rows of `base`, then what `saved` has more, and over both the rows of `tokens`."""
    import torch

    from portllm.algebra.edits import Replace

    old, rows = base[1].shape[0], saved[1].shape[0]
    trained = dict(zip(tokens.indices, tokens.values, strict=True)) if tokens is not None else {}

    def read(row: int, count: int) -> Tensor:
        stop = rows if count < 0 else row + count
        parts = []
        if row < old:
            parts.append(read_rows(*base, row, min(stop, old) - row).double())
        if stop > old:
            first = max(row, old)
            parts.append(read_rows(*saved, first, stop - first).double())
        values = torch.cat(parts)
        for index in range(row, stop):
            if index in trained:
                values[index - row] = trained[index].double()
        return values

    return Replace(read)
