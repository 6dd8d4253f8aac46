"""The distance between two releases: drift = ‖θ' − θ‖_F / ‖θ‖_F."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20


def squared_distance(new: Tensor, old: Tensor) -> float:
    """Return ‖new − old‖²_F of two tensors of one shape and any float dtype; differences in fp32, summed in fp64.

    Works block by block: no temporary is larger than BLOCK_ELEMENTS. Raises ValueError when the shapes differ.
    """
    if new.shape != old.shape:
        raise ValueError(f"shapes differ: {tuple(new.shape)} and {tuple(old.shape)}")
    pairs = zip(_blocks(new), _blocks(old), strict=True)
    return math.fsum(_squares(a.float() - b.float()) for a, b in pairs)


def squared_norm(x: Tensor) -> float:
    """Return ‖x‖²_F of a tensor of any float dtype, summed in fp64 block by block."""
    return math.fsum(_squares(block.float()) for block in _blocks(x))


def ratio(squared_part: float, squared_whole: float) -> float | None:
    """Return √part / √total, or None where the total is zero (a tensor of zeros has no relative drift)."""
    return math.sqrt(squared_part / squared_whole) if squared_whole > 0 else None


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x.reshape(-1), BLOCK_ELEMENTS)


def _squares(block: Tensor) -> float:
    return float(block.square().sum(dtype=torch.float64))
