"""What config.json must say so that a causal language model loads as a classifier, with the head a patch brings."""

from __future__ import annotations

from typing import Any

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.files.headers import TensorEntry
from portllm.errors import UnsupportedPatchError

CAUSAL = ("ForCausalLM", "LMHeadModel")


def classifier(base: Checkpoint, parameter: str, entry: TensorEntry) -> dict[str, Any]:
    """The changes of config.json for a head of shape (labels, hidden). Raises UnsupportedPatchError."""
    architecture = str((base.config.get("architectures") or [""])[0])
    stem = next((architecture.removesuffix(end) for end in CAUSAL if architecture.endswith(end)), "")
    if not stem or parameter.rpartition(".")[2] != "weight" or len(entry.shape) != 2:
        raise UnsupportedPatchError(
            f"{parameter}: {base.path} is a {architecture or 'model of unknown class'} without that head; "
            "expected a causal language model, for which the head of a classifier is known"
        )
    labels = [f"LABEL_{i}" for i in range(entry.shape[0])]
    return {
        "architectures": [f"{stem}ForSequenceClassification"],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
