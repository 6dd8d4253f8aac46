"""Errors of transformers when it opens a model, and tokens that a model lacks, as errors of portllm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from portllm.errors import MachineError, PortllmError


@contextlib.contextmanager
def refusals(path: Path, kind: type[PortllmError], template: str) -> Iterator[None]:
    """Raise as `kind` what transformers raises for the checkpoint at `path`, its cause at the {} of `template`.

    This covers truncated files and sizes that contradict config.json. Raises MachineError for a GPU that is too small.
    """
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{path}: does not fit into the GPU's memory ({_line(error)}); free some of it, or use a larger GPU"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise kind(f"{path}: {template.format(_line(error))}") from error


def known_tokens(model: Any) -> int:
    """Return the number of rows of the embedding of `model`: its tokens are those below it."""
    return int(model.get_input_embeddings().weight.shape[0])


def unknown(token: int, rows: int) -> str:
    """Return the message for a token that a model has no embedding for."""
    return (
        f"the tokenizer makes token {token} of the text, the model has tokens 0 to {rows - 1}; use the "
        "tokenizer it was trained with"
    )


def _line(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):  # transformers writes the details to its log
        return "it has tensors of other shapes than its config.json says"
    return " ".join(str(error).split())[:300]
