"""Proof of a ported directory.

    manifest.py       against its own port.json: every file and digest
    counterparts.py   configs and other files against base and patch
    proof.py          tensors against base and patch: copied bytes, recomputed sums

Public names, imported on first use: `Manifest`, `Proof`, `TensorSample`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm import lazy

if TYPE_CHECKING:
    from portllm.checkpoint.verification.manifest import Manifest as Manifest
    from portllm.checkpoint.verification.proof import Proof as Proof
    from portllm.checkpoint.verification.proof import TensorSample as TensorSample

_HOMES = {
    "Manifest": "manifest",
    "Proof": "proof",
    "TensorSample": "proof",
}
__getattr__ = lazy.exporter(__name__, _HOMES)
