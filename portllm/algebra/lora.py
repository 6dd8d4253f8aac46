"""LoRA's weight update Δ = scale · B A: its sum with weights in one rounding, and its norm without forming Δ.

LoRA: arXiv:2106.09685. In this file a is A (r, in), b is B (out, r), Δ is (out, in).
"""

from __future__ import annotations

import torch
from torch import Tensor

from portllm.algebra.sums import Update, check_factors
from portllm.errors import ShapeError


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the weight update (out, in) in fp32: scale · b (out, r) @ a (r, in). Raises ShapeError."""
    check_factors(a, b)
    return torch.mm(b.double(), a.double()).mul_(scale).float()


def add_delta(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return weight (out, in) + Δ: the exact sum rounded once to the weight's dtype. Raises ShapeError."""
    check_factors(a, b)
    if weight.shape != (b.shape[0], a.shape[1]):
        raise ShapeError(f"update is {b.shape[0]}×{a.shape[1]}, weight is {tuple(weight.shape)}; expected one shape")
    out = torch.empty_like(weight)
    Update(a, b, scale).add_rows(weight, 0, out)
    return out


class Scratch:
    """Work space for blocks of at most `elements` elements, reused so that no block allocates memory."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[torch.dtype, torch.Size], Tensor] = {}

    def like(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor of `weight`'s shape; calls with the same dtype share the memory."""
        if (dtype, weight.shape) not in self._views:
            if dtype not in self._buffers:
                self._buffers[dtype] = torch.empty(self.elements, dtype=dtype)
            self._views[dtype, weight.shape] = self._buffers[dtype][: weight.numel()].view(weight.shape)
        return self._views[dtype, weight.shape]


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 values rounded to the nearest of `dtype`, ties to even, in one rounding.

    torch converts float64 to a 16-bit dtype through float32, which rounds twice. The first rounding is therefore to
    odd: the last bit is set when the value is inexact. The second rounding is then right: Boldo and Melquiond, 2008.
    """
    near = value.float()
    if dtype in (torch.float32, torch.float64):
        return near if dtype == torch.float32 else value
    rounded = near.double()
    bits = near.view(torch.int32)
    bits.sub_((rounded.abs() > value.abs()).int())  # towards zero: sign and magnitude are separate bits
    bits.bitwise_or_((rounded != value).int())
    return near.to(dtype)


def inner(a1: Tensor, b1: Tensor, s1: float, a2: Tensor, b2: Tensor, s2: float) -> float:
    """Return ⟨Δ1, Δ2⟩ = s1 s2 tr((B1ᵀB2)(A2A1ᵀ)) in float64, from r1 × r2 matrices only. Raises ShapeError."""
    check_factors(a1, b1)
    check_factors(a2, b2)
    if a1.shape[1] != a2.shape[1] or b1.shape[0] != b2.shape[0]:
        raise ShapeError(
            f"updates are {b1.shape[0]}×{a1.shape[1]} and {b2.shape[0]}×{a2.shape[1]}; expected one module's shape"
        )
    left = b1.double().T @ b2.double()
    right = a1.double() @ a2.double().T
    return s1 * s2 * float((left * right).sum())


def delta_norm(a: Tensor, b: Tensor, scale: float) -> float:
    """Return ‖Δ‖_F = |scale| √tr((BᵀB)(AAᵀ)) in float64, without forming BA. Raises ShapeError."""
    # rounding can make a sum of squares slightly negative
    return float(abs(scale) * max(inner(a, b, 1.0, a, b, 1.0), 0.0) ** 0.5)
