"""Batches: every row once an epoch, the same for any number of processes, little padding where grouped."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from portllm.lm.data.encoding import IGNORED
from portllm.lm.learning.batches import Collator, GlobalBatches, TokenCounts

ROWS = 103
LENGTHS = random.Random(0).choices(range(3, 200), k=ROWS)


def epoch(number: int, *, lengths: list[int] | None = None, index: int = 0, count: int = 1) -> list[list[int]]:
    batches = GlobalBatches(ROWS, 8, 5, lengths=lengths, index=index, count=count)
    batches.set_epoch(number)
    found = list(batches)
    assert len(found) == len(batches)
    return found


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_processes_share_the_batches_of_one(lengths: list[int] | None, count: int) -> None:
    alone = epoch(1, lengths=lengths)
    shares = [epoch(1, lengths=lengths, index=i, count=count) for i in range(count)]
    for step, rows in enumerate(alone):
        assert sorted(chain(*(share[step] for share in shares))) == sorted(rows)
        sizes = [len(share[step]) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(lengths: list[int] | None) -> None:
    first, again, second = (epoch(number, lengths=lengths) for number in (0, 0, 1))
    assert first == again != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(ROWS))


def test_grouped_rows_need_less_padding_and_lengths_come_in_no_order() -> None:
    def padding(batches: list[list[int]]) -> float:
        full = sum(len(rows) * max(LENGTHS[row] for row in rows) for rows in batches)
        return 1 - sum(LENGTHS) / full

    grouped = epoch(0, lengths=LENGTHS)
    assert padding(grouped) < 0.12 < 0.3 < padding(epoch(0))
    longest = [max(LENGTHS[row] for row in rows) for rows in grouped]
    assert longest != sorted(longest) != sorted(longest, reverse=True)


def test_a_process_without_rows_gets_a_batch_without_loss() -> None:
    shares = [epoch(0, index=i, count=8) for i in range(8)]
    assert [len(share[-1]) for share in shares] == [1] * (ROWS % 8) + [0] * (8 - ROWS % 8)
    counts = TokenCounts()
    batch = Collator(0, counts)([])
    assert batch["labels"].tolist() == [[IGNORED, IGNORED]]
    assert counts == TokenCounts(computed=2, useful=0)


def test_padding_is_counted_and_carries_no_loss() -> None:
    counts = TokenCounts()
    collate = Collator(9, counts)
    batch = collate([{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert torch.equal(batch["input_ids"], torch.tensor([[1, 2, 3], [4, 9, 9]]))
    assert torch.equal(batch["labels"], torch.tensor([[IGNORED, 2, 3], [4, IGNORED, IGNORED]]))
    assert counts == TokenCounts(computed=6, useful=4)
