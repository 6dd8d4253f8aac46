"""What goes wrong where transformers opens a model or a model meets its tokenizer, as errors of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from portllm.errors import MachineError, PortllmError


@contextlib.contextmanager
def refusals(path: Path, kind: type[PortllmError], told: str) -> Iterator[None]:
    """Whatever transformers raises for the checkpoint at `path`, as `kind`, with its cause for the {} in `told`.

    A file cut short and sizes that contradict config.json among it. Raises MachineError for a GPU that is too small.
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
        raise kind(f"{path}: {told.format(_line(error))}") from error


def known_tokens(model: Any) -> int:
    """How many tokens `model` has a row of its embedding for: it knows those from 0 up to that."""
    return int(model.get_input_embeddings().weight.shape[0])


def unknown(token: int, known: int) -> str:
    """What to say of a token that a model has no row for."""
    return (
        f"the tokenizer makes token {token} of the text, the model knows 0 to {known - 1}; take the tokenizer it was "
        "trained with"
    )


def _line(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):  # transformers has put the details into its log
        return "it has tensors of other shapes than its config.json says"
    return " ".join(str(error).split())[:300]
