"""From one low-rank update of a parameter to the blocks of the tensors on disk that it changes.

A tensor on disk is seen as (rows, columns), leading axes flattened; so one expert of a fused tensor is a block of rows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.adapter.factors import LoraPair, factors, read_finite_array
from portllm.checkpoint.base.layout import StoredBlock
from portllm.checkpoint.files.tensors import TensorEntry

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Matrix = NDArray[Any] | Tensor

FactorReader = Callable[[], tuple["Matrix", "Matrix"]]
Span = tuple[int, int]


@dataclass(frozen=True)
class LowRank:
    """An update of a matrix (rows, columns): scale · b @ a; `factors` reads them."""

    factors: FactorReader  # a (r, columns), b (rows, r)
    shape: tuple[int, int]
    scale: float
    sources: tuple[str, ...]  # names of the patch's tensors, for people

    def turned(self) -> LowRank:
        """Return the update of the transposed matrix: (B A)ᵀ = Aᵀ Bᵀ."""

        def turn() -> tuple[Matrix, Matrix]:
            a, b = self.factors()
            return b.T, a.T

        return replace(self, factors=turn, shape=self.shape[::-1])

    def cut(self, rows: Span, columns: Span) -> LowRank:
        """Return the update of a block of the matrix."""
        if (rows, columns) == ((0, self.shape[0]), (0, self.shape[1])):
            return self

        def block() -> tuple[Matrix, Matrix]:
            a, b = self.factors()
            return a[:, columns[0] : columns[1]], b[rows[0] : rows[1]]

        return replace(self, factors=block, shape=(rows[1] - rows[0], columns[1] - columns[0]))


@dataclass(frozen=True)
class BlockUpdate:
    """An update of the block of a tensor on disk whose first element is (row, column)."""

    tensor: str
    row: int
    column: int
    update: LowRank

    @property
    def block(self) -> tuple[Span, Span]:
        """([first row, stop), [first column, stop))."""
        rows, columns = self.update.shape
        return (self.row, self.row + rows), (self.column, self.column + columns)


def of_pair(pair: LoraPair, scale: float) -> LowRank:
    """Return the update of a linear module's (out, in) or an embedding's (vocabulary, dim) weight, as PEFT forms it."""
    sources = (pair.a_entry.name, pair.b_entry.name)
    return LowRank(lambda: pair.arrays, pair.shape, scale * pair.scaling, sources)


def of_expert(pair: LoraPair, experts: int, expert: int, scale: float, cache: FactorCache) -> LowRank:
    """Return the update (out, in) of one expert's matrix by a pair that holds all of them."""
    sources = (pair.a_entry.name, pair.b_entry.name)
    return LowRank(lambda: factors(pair, experts, expert, cache.read), pair.shape, scale * pair.scaling, sources)


def block_updates(
    blocks: Sequence[StoredBlock], update: Callable[[int], LowRank], shape: Callable[[str], tuple[int, ...]]
) -> Iterator[BlockUpdate]:
    """Yield one parameter's update block by block on disk; `update(e)` is that of expert e.

    `shape` gives the shape of a tensor on disk.
    """
    for stored in blocks:
        spans = [axis if isinstance(axis, tuple) else (axis, axis + 1) for axis in stored.at]
        experts = range(*spans[0]) if len(spans) == 3 else range(1)
        height = shape(stored.tensor)[-2]
        first = stored.of[0][0] if len(stored.of) == 3 else 0
        for count, expert in enumerate(experts):
            block = update(expert).cut(spans[-2], spans[-1])
            block = block.turned() if stored.transposed else block
            yield BlockUpdate(stored.tensor, (first + count) * height + stored.of[-2][0], stored.of[-1][0], block)


def block_reader(entry: TensorEntry, stored: StoredBlock) -> Callable[[int, int], Tensor]:
    """Return read(row, count) of the block on disk of a parameter that the patch saved complete; −1 for all rows."""
    spans = [axis if isinstance(axis, tuple) else (axis, axis + 1) for axis in stored.at] or [(0, 1)]
    height = entry.shape[-2] if len(entry.shape) > 1 else 1
    first = (spans[0][0] * height if len(spans) == 3 else 0) + (spans[-2][0] if len(spans) > 1 else 0)
    rows = spans[-2][1] - spans[-2][0] if len(spans) > 1 else 1
    matrices = spans[0][1] - spans[0][0] if len(spans) == 3 else 1

    def straight(row: int, count: int) -> Tensor:
        taken = rows * matrices if count < 0 else count
        return entry.rows(first + row, taken)[:, spans[-1][0] : spans[-1][1]]

    def turned(row: int, count: int) -> Tensor:
        block = straight(0, -1).T
        return block if count < 0 else block[row : row + count]

    return turned if stored.transposed else straight


def overlap(group: Sequence[BlockUpdate]) -> bool:
    """Return whether two updates of one tensor share an element."""
    blocks = sorted(update.block for update in group)
    for i, (rows, columns) in enumerate(blocks):
        for other_rows, other_columns in blocks[i + 1 :]:
            if other_rows[0] >= rows[1]:
                break
            if columns[0] < other_columns[1] and other_columns[0] < columns[1]:
                return True
    return False


class FactorCache:
    """The factors read last: a layer's experts, which are next to each other on disk, share them."""

    def __init__(self, kept: int = 8) -> None:
        self._tensors: OrderedDict[TensorEntry, NDArray[Any]] = OrderedDict()
        self._kept, self._lock = kept, threading.Lock()

    def read(self, entry: TensorEntry) -> NDArray[Any]:
        """Return one tensor of the patch. Raises PatchError where it is not finite."""
        with self._lock:
            if entry not in self._tensors:
                self._tensors[entry] = read_finite_array(entry)
                if len(self._tensors) > self._kept:
                    self._tensors.popitem(last=False)
            return self._tensors[entry]
