"""What a patch holds for one module: a pair of low-rank factors, or the rows of some tokens; read when asked for.

LoRA: arXiv:2106.09685; DoRA: arXiv:2402.09353. How PEFT packs the factors of several experts into one pair of matrices:
`ParamWrapper.get_delta_weight` of peft 0.21.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from portllm.checkpoint.base.checkpoint import read_array, read_tensor
from portllm.checkpoint.files.headers import TensorEntry
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
    and lora_embedding_B (dim, r), which `a` and `b` turn, so that Δ is (vocabulary, dim). `parameter`: they are lora_A
    (r·E, in) and lora_B (out, r·E) for E experts, and `factors` takes one expert's out of them; their rank and scaling
    are known when adapter_config.stack_pairs has told which parameter they are for, 1 and NaN before. `magnitude` is
    DoRA's m, `bias` lora_B's own bias (lora_bias), each a vector.
    """

    module: str
    kind: PairKind
    path: Path
    a_entry: TensorEntry
    b_entry: TensorEntry
    rank: int
    scaling: float
    magnitude: TensorEntry | None = None
    bias: TensorEntry | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the update; of one expert's for a parameter."""
        if self.kind == "embedding":
            return self.a_entry.shape[1], self.b_entry.shape[0]
        return self.b_entry.shape[0], self.a_entry.shape[1]

    @property
    def experts(self) -> int:
        """E, how many updates the pair holds: 1 but for a parameter with a leading axis of experts."""
        return self.a_entry.shape[0] // self.rank

    @property
    def a(self) -> torch.Tensor:
        """A (r, columns) in its own dtype. Raises PatchError where it is not finite."""
        return self.read(self.b_entry).T if self.kind == "embedding" else self.read(self.a_entry)

    @property
    def b(self) -> torch.Tensor:
        """B (rows, r) in its own dtype. Raises PatchError where it is not finite."""
        return self.read(self.a_entry).T if self.kind == "embedding" else self.read(self.b_entry)

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """`a` and `b` as arrays, bfloat16 as float32. Raises PatchError where one is not finite."""
        a, b = read_finite_array(self.path, self.a_entry), read_finite_array(self.path, self.b_entry)
        return (b.T, a.T) if self.kind == "embedding" else (a, b)

    @property
    def magnitude_values(self) -> torch.Tensor:
        """DoRA's m as a vector in its own dtype. Raises PatchError where there is none or it is not finite."""
        return self._vector(self.magnitude, "lora_magnitude_vector")

    @property
    def bias_values(self) -> torch.Tensor:
        """lora_B's bias (out,), to be scaled like Δ. Raises PatchError where there is none or it is not finite."""
        return self._vector(self.bias, "lora_B.bias")

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """One tensor of the patch's file in its own dtype. Raises PatchError where it is not finite."""
        return read_finite(self.path, entry)

    def _vector(self, entry: TensorEntry | None, what: str) -> torch.Tensor:
        if entry is None:
            raise PatchError(f"{self.path}: {self.module} has no {what}; expected one, was the patch saved whole?")
        return self.read(entry).reshape(-1)


@dataclass(frozen=True)
class TokenRows:
    """The rows of an embedding that were trained (trainable_token_indices); they take the base's rows' place."""

    module: str
    indices: tuple[int, ...]
    path: Path
    entry: TensorEntry

    @property
    def values(self) -> torch.Tensor:
        """The new rows (len(indices), dim) in their own dtype. Raises PatchError where one is not finite."""
        return read_finite(self.path, self.entry)


def read_finite(path: Path, entry: TensorEntry) -> torch.Tensor:
    """One tensor of a patch in its own dtype. Raises PatchError where it is not finite, CheckpointError."""
    tensor = read_tensor(path, entry)
    if not tensor.isfinite().all():
        raise PatchError(f"{path}: tensor {entry.name} holds NaN or infinity; expected finite values, train it again")
    return tensor


def read_finite_array(path: Path, entry: TensorEntry) -> NDArray[Any]:
    """One tensor of a patch as an array, bfloat16 as float32. Raises PatchError where it is not finite."""
    import numpy

    array = read_array(path, entry)
    if not numpy.isfinite(array).all():
        raise PatchError(f"{path}: tensor {entry.name} holds NaN or infinity; expected finite values, train it again")
    return array


def factors(
    pair: LoraPair, experts: int, expert: int, read: Callable[[Path, TensorEntry], Matrix] = read_finite
) -> tuple[Matrix, Matrix]:
    """(a (r, in), b (out, r)) of one expert; Δ of that expert = pair.scaling · b @ a.

    lora_A (E·r, in) counts the expert slowest, lora_B (out, r·E) fastest. `read` may keep what it
    read for the next expert. Raises ShapeError, PatchError.
    """
    a, b = read(pair.path, pair.a_entry), read(pair.path, pair.b_entry)
    if a.shape[0] != experts * pair.rank or b.shape[1] != experts * pair.rank or not 0 <= expert < experts:
        raise ShapeError(
            f"{pair.module}: the patch holds {pair.experts} experts of rank {pair.rank}, expected {experts}; "
            "is this a release of the base the patch was trained on?"
        )
    return a[expert * pair.rank : (expert + 1) * pair.rank], b[:, expert::experts]
