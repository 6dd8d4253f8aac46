"""What becomes of one tensor, row by row: every way a patch changes a weight, with one rounding to the weight's dtype.

A tensor is seen as (rows, columns): leading axes flattened, a vector as one row.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from portllm.algebra.lora import Scratch


class Edit(Protocol):
    """How the rows of a changed tensor are computed from the old ones."""

    surveys: bool
    """Whether `survey` must see every old row before the first call of `rows`."""

    def survey(self, old: Tensor, row: int, scratch: Scratch) -> None:
        """Look at the old rows (count, columns) from `row` on; called in order, over the whole tensor."""

    def rows(self, old: Tensor | None, row: int, out: Tensor, scratch: Scratch) -> float:
        """Write the new rows (count, columns) from `row` on into `out`, in its dtype.

        `old` holds the base's rows, or None where nothing of the base is read. Returns an upper bound of the largest
        absolute value written, or NaN where one is.
        """
