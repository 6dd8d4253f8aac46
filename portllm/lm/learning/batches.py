"""Which rows each training step reads, and how they become tensors: the same on one process and on many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from portllm import processes
from portllm.errors import ParamsError
from portllm.lm.data.encoding import IGNORED, Example

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

    from portllm.params import OptimParams

Batch = Mapping[str, "Tensor"]

# the rows of that many batches are sorted by length together: little padding is left, and batches stay random
POOL_BATCHES = 50


class GlobalBatches:
    """The rows of each batch for one process of `count`: a batch sampler whose union over all is one batch of `size`.

    The order depends on seed and epoch alone, so the machine is no part of the experiment; the last batch of an epoch
    is short rather than filled up. With `lengths`, rows of like length come together. A process may get no row at all.
    """

    def __init__(
        self, rows: int, size: int, seed: int, *, lengths: Sequence[int] | None = None, index: int = 0, count: int = 1
    ) -> None:
        self._rows, self._size, self._seed, self._lengths = rows, size, seed, lengths
        self._index, self._count = index, count
        self._epoch = self._skipped = 0

    def set_epoch(self, epoch: int, *, skip: int = 0) -> None:
        """Set the epoch that is read next, without its first `skip` batches."""
        self._epoch, self._skipped = epoch, skip

    def __len__(self) -> int:
        return -(-self._rows // self._size)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self._batches()[self._skipped :]:
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
        # in the pools' own order long and short batches would alternate all the time
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _cut(self, order: Sequence[int]) -> list[list[int]]:
        return [list(order[at : at + self._size]) for at in range(0, len(order), self._size)]


@dataclass
class TokenCounts:
    """How many tokens were computed (`computed`), and how many of them are no padding (`useful`)."""

    computed: int = 0
    useful: int = 0


@dataclass(frozen=True)
class Collator:
    """Makes a batch of examples: input_ids and labels, int64 (rows, longest example), padded on the right.

    No attention mask: under causal attention no token of the text attends to the padding after it, and without a mask
    the fast attention kernel is used. No example gives one row without loss.
    """

    pad_token_id: int
    counts: TokenCounts = field(default_factory=TokenCounts)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        import torch

        rows = examples or [{"input_ids": [self.pad_token_id] * 2, "labels": [IGNORED] * 2}]
        longest = max(len(row["input_ids"]) for row in rows)
        self.counts.computed += longest * len(rows)
        self.counts.useful += sum(len(row["input_ids"]) for row in examples)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        return {
            key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
            for key, value in fill.items()
        }


def loader(examples: Sequence[Example], collator: Collator, optim: OptimParams, seed: int) -> DataLoader[Any]:
    """Return this process's rows of every batch, as tensors."""
    from torch.utils.data import DataLoader

    lengths = [len(example["input_ids"]) for example in examples] if optim.group_by_length else None
    batches = GlobalBatches(
        len(examples), optim.batch_size, seed, lengths=lengths, index=processes.index(), count=processes.count()
    )
    return DataLoader(examples, batch_sampler=batches, collate_fn=collator)  # type: ignore[arg-type]


def updates(
    loader: DataLoader[Any], step: int, optim: OptimParams, restore_random: Callable[[], None] | None
) -> Iterator[list[Batch]]:
    """Yield the batches of each step after `step`, epoch after epoch; the last step of an epoch may have fewer.

    `restore_random` is called when the random generators are about to be drawn from.
    """
    batches: Any = loader.batch_sampler
    epoch, done = divmod(step, math.ceil(len(loader) / optim.gradient_accumulation))
    for number in itertools.count(epoch):
        batches.set_epoch(number, skip=done * optim.gradient_accumulation)
        # the loader draws a number as an epoch begins: a snapshot of the epoch's end is from before, any other after
        if restore_random and not done:
            restore_random()
        rest = iter(loader)
        if restore_random and done:
            restore_random()
        while update := list(itertools.islice(rest, optim.gradient_accumulation)):
            yield update
        done, restore_random = 0, None


def steps(optim: OptimParams, rows: int) -> int:
    """Return the number of all steps of a training on `rows` rows."""
    batches = math.ceil(rows / optim.batch_size)
    return optim.max_steps or math.ceil(optim.epochs * math.ceil(batches / optim.gradient_accumulation))


def rows_per_process(optim: OptimParams) -> int:
    """Return each process's share of a batch. Raises ParamsError where the processes cannot share it evenly."""
    rows, rest = divmod(optim.batch_size, processes.count())
    if rest or not rows:
        raise ParamsError(
            f"optim.batch_size counts the rows of all processes together: expected a multiple of the "
            f"{processes.count()} processes, found {optim.batch_size}"
        )
    return rows
