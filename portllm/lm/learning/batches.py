"""Which rows each training step sees, and how they become tensors: the same on one process and on many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from portllm.lm.data.encoding import IGNORED, Example

if TYPE_CHECKING:
    from torch import Tensor

# how many batches' rows are sorted by length together: padding all but goes, and batches stay random
POOL_BATCHES = 50


class GlobalBatches:
    """The rows of each step for one process of `count`: a batch sampler whose union over all is one batch of `size`.

    Order depends on seed and epoch alone, so the machine is no part of the experiment; the last batch of an epoch is
    short rather than filled up. With `lengths`, rows of like length come together. A process may get no row at all.
    """

    def __init__(
        self, rows: int, size: int, seed: int, *, lengths: Sequence[int] | None = None, index: int = 0, count: int = 1
    ) -> None:
        self._rows, self._size, self._seed, self._lengths = rows, size, seed, lengths
        self._index, self._count = index, count
        self._epoch = 0

    @property
    def batch_sampler(self) -> GlobalBatches:
        """Itself: Trainer tells the epoch to what its loader's batch sampler wraps."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Which epoch is read next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._rows // self._size)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self._batches():
            yield rows[self._index :: self._count]

    def _batches(self) -> list[list[int]]:
        import torch

        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order: list[int] = torch.randperm(self._rows, generator=generator).tolist()
        if self._lengths is None:
            return self._cut(order)
        length, pool = self._lengths.__getitem__, POOL_BATCHES * self._size
        pools = [sorted(order[at : at + pool], key=length, reverse=True) for at in range(0, self._rows, pool)]
        batches = self._cut([row for rows in pools for row in rows])
        # in the pools' own order long and short batches would take turns all the time
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _cut(self, order: Sequence[int]) -> list[list[int]]:
        return [list(order[at : at + self._size]) for at in range(0, len(order), self._size)]


@dataclass
class Counter:
    """Tokens seen: all that were computed, and those that are no padding."""

    tokens: int = 0
    useful: int = 0


@dataclass(frozen=True)
class Collator:
    """Examples to a batch: input_ids and labels, int64 (rows, longest example), padded on the right.

    No attention mask: under causal attention no token of the text sees the padding behind it, and
    without a mask the fast attention kernel is taken. No example gives one row without loss.
    """

    pad_token_id: int
    counter: Counter = field(default_factory=Counter)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        import torch

        rows = examples or [{"input_ids": [self.pad_token_id] * 2, "labels": [IGNORED] * 2}]
        longest = max(len(row["input_ids"]) for row in rows)
        self.counter.tokens += longest * len(rows)
        self.counter.useful += sum(len(row["input_ids"]) for row in examples)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        return {
            key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
            for key, value in fill.items()
        }
