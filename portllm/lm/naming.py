"""Which way to ask where a checkpoint's parameters are: by look-up where that is known to be right, else transformers."""

from __future__ import annotations

from portllm.checkpoint.layout import PLAIN, Layout, plain
from portllm.checkpoint.reader import Checkpoint


def layout_of(base: Checkpoint) -> Layout:
    """The layout of `base`. Only families that are not plain cost the import of transformers (seconds).

    A model with code of its own, which portllm does not run, has no renamings in transformers, so its names on disk are
    those in memory; what its tied weights are is then believed of config.json. Raises CheckpointError.
    """
    if base.config.get("model_type") in PLAIN or base.config.get("auto_map"):
        return plain(base)
    from portllm.lm.layout import built

    return built(base)
