"""The residual that a port omits: R = Δ' − Δ, with Δ' the patch trained again on the release and Δ the ported one.

A sum of LoRA products is one product of stacked factors (arXiv:2106.09685). So no (out, in) matrix is formed for the
patches: their norms are traces of rank × rank matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.algebra.lora import inner

BLOCK_ROWS = 4096


@dataclass(frozen=True)
class ScaledFactors:
    """Δ = scaling · b (out, r) @ a (r, in), any float dtype."""

    a: Tensor
    b: Tensor
    scaling: float

    def dot(self, other: ScaledFactors) -> float:
        """Return ⟨Δ₁, Δ₂⟩_F in fp64. Raises ShapeError."""
        return inner(self.a, self.b, self.scaling, other.a, other.b, other.scaling)

    def minus(self, other: ScaledFactors) -> ScaledFactors:
        """Return Δ₁ − Δ₂ as one product of rank r₁ + r₂, in fp64: b = [s₁b₁, −s₂b₂], a = [a₁; a₂]."""
        a = torch.cat([self.a.double(), other.a.double()])
        b = torch.cat([self.scaling * self.b.double(), -other.scaling * other.b.double()], dim=1)
        return ScaledFactors(a, b, 1.0)


def squared_patched(weight: Tensor, patch: ScaledFactors) -> float:
    """Return ‖W + Δ‖²_F = ‖W‖² + 2⟨W, Δ⟩ + ‖Δ‖² for W (out, in) of any float dtype; ⟨W, ba⟩ = Σ (W aᵀ) ⊙ b.

    Works in blocks of rows: the fp32 copy of W is never larger than BLOCK_ROWS × in.
    """
    a, total = patch.a.float(), 0.0
    for rows, b in zip(torch.split(weight, BLOCK_ROWS), torch.split(patch.b, BLOCK_ROWS), strict=True):
        block = rows.float()
        crossed = ((block @ a.T).double() * b.double()).sum()
        total += float(block.square().sum(dtype=torch.float64)) + 2 * patch.scaling * float(crossed)
    return max(0.0, total + patch.dot(patch))
