"""A base: a checkpoint, and which tensor on disk each parameter of the model in memory is.

    checkpoint.py   Checkpoint: config and headers of a directory
    layout.py       Layout: blocks of tensors on disk, by parameter; plain for the families without renames
    base.py         Base: a checkpoint with its layout
    comparison.py   what a release changes against the one before
    copying.py      a complete checkpoint copied

Public names, imported on first use: `Base`, `Checkpoint`, `Layout`, `changes`, `copy_checkpoint`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm import lazy

if TYPE_CHECKING:
    from portllm.checkpoint.base.base import Base as Base
    from portllm.checkpoint.base.checkpoint import Checkpoint as Checkpoint
    from portllm.checkpoint.base.comparison import changes as changes
    from portllm.checkpoint.base.copying import copy_checkpoint as copy_checkpoint
    from portllm.checkpoint.base.layout import Layout as Layout

_HOMES = {
    "Base": "base",
    "Checkpoint": "checkpoint",
    "Layout": "layout",
    "changes": "comparison",
    "copy_checkpoint": "copying",
}
__getattr__ = lazy.exporter(__name__, _HOMES)
