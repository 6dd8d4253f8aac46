"""What PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) take out of the base before training.

Both start B A from the weight itself and train against the rest, W − s·B0 A0. So on another base, which nothing was
taken out of, the patch is s·(B1 A1 − B0 A0), and B0 A0 must be computed again from the base it was made on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A0 (r, in), B0 (out, r)) in fp32 with s·B0 A0 = the `rank` largest singular triples of `weight` (out, in)."""
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root


def olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001  (one signature for both)
    """(A0 (r, in), B0 (out, r)) in fp32: the first `rank` rows of R and columns of Q of `weight` (out, in) = Q R."""
    q, r = torch.linalg.qr(weight.float())
    return r[:rank].contiguous(), q[:, :rank].contiguous()
