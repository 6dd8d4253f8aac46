"""What a written safetensors file shall hold: tensor by tensor, where its bytes come from and how they change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.checkpoint.files.headers import Header, TensorEntry

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit


@dataclass(frozen=True)
class Target:
    """One tensor of a written file.

    `entry` names it and says where it will stand. `origin` is the base's tensor (its file and its entry there) that is
    read alongside, of the same dtype and shape, or None where the edit makes the tensor from the patch alone. Without
    `edit` the origin's bytes are taken as they are. `edit()` reads the patch's factors, so it is called late, once.
    """

    entry: TensorEntry
    origin: tuple[Header, TensorEntry] | None
    edit: Callable[[], Edit] | None = None


@dataclass(frozen=True)
class TargetFile:
    """One written file: its first bytes (length and header), then its tensors in this order, without gaps."""

    path: Path
    head: bytes
    targets: tuple[Target, ...]
