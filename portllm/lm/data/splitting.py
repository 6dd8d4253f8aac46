"""Rows kept apart: what is asked must not be trained on, and every choice is the same for the same seed."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Collection, Mapping, Sequence


def key(text: str) -> str:
    """`text` without what makes no difference to a reader: case, white space, forms of the same character."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def without(keys: Sequence[str], asked: Collection[str]) -> list[int]:
    """The numbers of the rows whose key is not among those asked, in order."""
    known = set(asked)
    return [number for number, one in enumerate(keys) if one not in known]


def repeats(items: Sequence[object]) -> int:
    """How many items stand there a second time, or more."""
    return len(items) - len(set(items))


def sample(count: int, wanted: int, seed: str) -> list[int]:
    """`wanted` of the numbers below `count` by chance, in order; all where `wanted` is 0 or more than there are."""
    if not 0 < wanted < count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), wanted))  # noqa: S311  (repeatable, no secret)


def hold_out(keys: Sequence[str], wanted: Mapping[str, int], seed: str, *, rest: str) -> dict[str, list[int]]:
    """The row numbers of each split: about as many rows as wanted by chance, and the `rest`.

    Rows with the same key stay together, so that no split asks what another tells.
    """
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(keys):
        groups.setdefault(one, []).append(number)
    order = list(groups)
    random.Random(seed).shuffle(order)  # noqa: S311
    splits: dict[str, list[int]] = {split: [] for split in wanted}
    for split, count in wanted.items():
        while order and len(splits[split]) < count:
            splits[split] += groups[order.pop()]
    splits[rest] = [number for one in order for number in groups[one]]
    return {split: sorted(numbers) for split, numbers in splits.items()}
