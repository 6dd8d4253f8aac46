"""The patch of one module: a pair of low-rank factors, or the rows of some tokens; values are read on access.

LoRA: arXiv:2106.09685; DoRA: arXiv:2402.09353. The layout of several experts' factors in one pair of matrices is that
of `ParamWrapper.get_delta_weight` in peft 0.21.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from portllm.checkpoint.files.tensors import TensorEntry
from portllm.errors import PatchError, ShapeError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Matrix = torch.Tensor | NDArray[Any]

PairKind = Literal["linear", "embedding", "parameter"]


@dataclass(frozen=True)
class LoraPair:
    """One module's factors: Δ (rows, columns) = scaling · b (rows, r) @ a (r, columns).

    `linear`: the entries are lora_A (r, in) and lora_B (out, r). `embedding`: they are lora_embedding_A (r, vocabulary)
    and lora_embedding_B (dim, r), which `a` and `b` transpose, so that Δ is (vocabulary, dim). `parameter`: they are
    lora_A (r·E, in) and lora_B (out, r·E) for E experts, and `factors` returns those of one expert. Their rank is 1 and
    their scaling NaN until `targeting.stack_pairs` returns pairs with the values of their parameter. `magnitude` is
    DoRA's m, `bias` is the bias of lora_B (lora_bias); each is a vector.
    """

    module: str
    kind: PairKind
    a_entry: TensorEntry
    b_entry: TensorEntry
    rank: int
    scaling: float
    magnitude: TensorEntry | None = None
    bias: TensorEntry | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the update; of one expert's update for a parameter."""
        if self.kind == "embedding":
            return self.a_entry.shape[1], self.b_entry.shape[0]
        return self.b_entry.shape[0], self.a_entry.shape[1]

    @property
    def experts(self) -> int:
        """E, the number of updates in the pair: 1 except for a parameter with a leading axis of experts."""
        return self.a_entry.shape[0] // self.rank

    @property
    def a(self) -> torch.Tensor:
        """A (r, columns) in its own dtype. Raises PatchError where it is not finite."""
        return read_finite(self.b_entry).T if self.kind == "embedding" else read_finite(self.a_entry)

    @property
    def b(self) -> torch.Tensor:
        """B (rows, r) in its own dtype. Raises PatchError where it is not finite."""
        return read_finite(self.a_entry).T if self.kind == "embedding" else read_finite(self.b_entry)

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """`a` and `b` as arrays, bfloat16 as float32. Raises PatchError where one is not finite."""
        a, b = read_finite_array(self.a_entry), read_finite_array(self.b_entry)
        return (b.T, a.T) if self.kind == "embedding" else (a, b)

    @property
    def magnitude_values(self) -> torch.Tensor:
        """DoRA's m as a vector in its own dtype. Raises PatchError where there is none or it is not finite."""
        return self._vector(self.magnitude, "lora_magnitude_vector")

    @property
    def bias_values(self) -> torch.Tensor:
        """lora_B's bias (out,), to be scaled like Δ. Raises PatchError where there is none or it is not finite."""
        return self._vector(self.bias, "lora_B.bias")

    def _vector(self, entry: TensorEntry | None, what: str) -> torch.Tensor:
        if entry is None:
            raise PatchError(
                f"{self.a_entry.path}: {self.module} has no {what}; expected one, was the patch saved completely?"
            )
        return read_finite(entry).reshape(-1)


@dataclass(frozen=True)
class TokenRows:
    """The trained rows of an embedding (trainable_token_indices); they replace the base's rows."""

    module: str
    indices: tuple[int, ...]
    entry: TensorEntry

    @property
    def values(self) -> torch.Tensor:
        """The new rows (len(indices), dim) in their own dtype. Raises PatchError where one is not finite."""
        return read_finite(self.entry)


def read_finite(entry: TensorEntry) -> torch.Tensor:
    """Return one tensor of a patch in its own dtype. Raises PatchError where it is not finite, CheckpointError."""
    tensor = entry.read()
    if not tensor.isfinite().all():
        raise _not_finite(entry)
    return tensor


def read_finite_array(entry: TensorEntry) -> NDArray[Any]:
    """Return one tensor of a patch as an array, bfloat16 as float32. Raises PatchError where it is not finite."""
    import numpy

    array = entry.array()
    if not numpy.isfinite(array).all():
        raise _not_finite(entry)
    return array


def check_finite(entry: TensorEntry) -> None:
    """Raise PatchError when a tensor of a patch contains NaN or infinity; it is read in blocks."""
    if not entry.is_finite():
        raise _not_finite(entry)


def _not_finite(entry: TensorEntry) -> PatchError:
    return PatchError(
        f"{entry.path}: tensor {entry.name} holds NaN or infinity; expected finite values, train the patch again"
    )


def factors(
    pair: LoraPair, experts: int, expert: int, read: Callable[[TensorEntry], Matrix] = read_finite
) -> tuple[Matrix, Matrix]:
    """Return (a (r, in), b (out, r)) of one expert; Δ of that expert = pair.scaling · b @ a.

    The expert is the slowest index of lora_A (E·r, in), and the fastest of lora_B (out, r·E). `read` may cache tensors
    for the next expert. Raises ShapeError, PatchError.
    """
    a, b = read(pair.a_entry), read(pair.b_entry)
    if a.shape[0] != experts * pair.rank or b.shape[1] != experts * pair.rank or not 0 <= expert < experts:
        raise ShapeError(
            f"{pair.module}: the patch holds {pair.experts} experts of rank {pair.rank}, expected {experts}; "
            "is this a release of the base the patch was trained on?"
        )
    return a[expert * pair.rank : (expert + 1) * pair.rank], b[:, expert::experts]
