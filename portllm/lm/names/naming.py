"""Where a checkpoint's parameters are: looked up for families proven plain, otherwise derived from transformers."""

from __future__ import annotations

from pathlib import Path

from portllm.checkpoint.base.base import Base
from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.base.layout import PLAIN, Layout, plain


def layout_of(base: Checkpoint) -> Layout:
    """The layout of `base`. Only families that are not plain cost the import of transformers (seconds).

    A model with code of its own, which portllm does not run, and of a type transformers does not have, is renamed by
    nobody: its names on disk are those in memory, and config.json is believed about tied weights. Raises
    CheckpointError.
    """
    kind = base.config.get("model_type")
    if kind in PLAIN:
        return plain(base)
    from portllm.lm.names.layout import built

    if base.config.get("auto_map"):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if kind not in CONFIG_MAPPING:
            return plain(base)
    return built(base)


def open_base(path: Path) -> Base:
    """Return the base at `path`: its checkpoint, with the layout of its architecture. Raises CheckpointError."""
    checkpoint = Checkpoint.open(path)
    return Base(checkpoint, layout_of(checkpoint))
