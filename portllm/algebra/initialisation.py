"""The part of the base that PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) subtract before training.

Both initialise B A from the weight itself and train it with the rest, W − s·B0 A0. Nothing is subtracted from another
base, so there the patch is s·(B1 A1 − B0 A0). B0 A0 is computed again from the base that the patch was trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return (A0 (r, in), B0 (out, r)) in fp32; s·B0 A0 contains the `rank` largest singular triples of `weight`."""
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root


def olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001  (one signature for both)
    """Return (A0 (r, in), B0 (out, r)) in fp32: the first r rows of R and columns of Q, `weight` (out, in) = Q R."""
    q, r = torch.linalg.qr(weight.float())
    return r[:rank].contiguous(), q[:, :rank].contiguous()
