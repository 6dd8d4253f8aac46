"""LoRA's weight update Δ = scale · B A and what can be known of it without forming it.

LoRA: arXiv:2106.09685. Everywhere: a is A (r, in), b is B (out, r), Δ is (out, in).
"""

from __future__ import annotations

import torch
from torch import Tensor

from portllm.errors import ShapeError


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Weight update (out, in) in fp32 = scale · b (out, r) @ a (r, in). Raises ShapeError."""
    _check(a, b)
    return torch.mm(b.double(), a.double()).mul_(scale).float()


def add_delta(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight (out, in) + Δ, computed in float64 and rounded once to the weight's dtype. Raises ShapeError."""
    _check(a, b)
    if weight.shape != (b.shape[0], a.shape[1]):
        raise ShapeError(f"update is {b.shape[0]}×{a.shape[1]}, weight is {tuple(weight.shape)}; expected one shape")
    total = torch.addmm(weight.double(), b.double() * scale, a.double())
    return round_once(total, weight.dtype)


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded to the nearest of `dtype`, ties to even, in one rounding.

    torch converts float64 to a 16-bit type by way of float32, which rounds twice. Rounding to odd on the way (the
    last bit is set when anything was lost) makes the second rounding right: Boldo and Melquiond, 2008.
    """
    near = value.float()
    if dtype in (torch.float32, torch.float64):
        return near if dtype == torch.float32 else value
    back = near.double()
    bits = near.view(torch.int32)
    bits.sub_((back.abs() > value.abs()).int())  # towards zero: sign and magnitude are separate bits
    bits.bitwise_or_((back != value).int())
    return near.to(dtype)


def inner(a1: Tensor, b1: Tensor, s1: float, a2: Tensor, b2: Tensor, s2: float) -> float:
    """⟨Δ1, Δ2⟩ = s1 s2 tr((B1ᵀB2)(A2A1ᵀ)) in float64: r1 × r2 matrices only. Raises ShapeError."""
    _check(a1, b1)
    _check(a2, b2)
    if a1.shape[1] != a2.shape[1] or b1.shape[0] != b2.shape[0]:
        raise ShapeError(
            f"updates are {b1.shape[0]}×{a1.shape[1]} and {b2.shape[0]}×{a2.shape[1]}; expected the same module of one shape"
        )
    left = b1.double().T @ b2.double()
    right = a1.double() @ a2.double().T
    return s1 * s2 * float((left * right).sum().item())


def delta_norm(a: Tensor, b: Tensor, scale: float) -> float:
    """‖Δ‖_F = |scale| √tr((BᵀB)(AAᵀ)) in float64, never forming BA. Raises ShapeError."""
    # rounding can leave a sum of squares a hair below zero
    return abs(scale) * max(inner(a, b, 1.0, a, b, 1.0), 0.0) ** 0.5


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ShapeError(f"lora_A is {tuple(a.shape)} and lora_B is {tuple(b.shape)}, expected (r, in) and (out, r)")
