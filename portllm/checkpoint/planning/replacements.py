"""Replacements in a plan: modules saved complete, rows of trained tokens, heads of classifiers, grown vocabularies.

A vocabulary that grew before training: PEFT then saves the complete resized embedding and head (save_embedding_layers).
Their first rows are the old base's and are not used; the new ones are, trained (trainable_token_indices) or as
initialised.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.adapter.factors import TokenRows
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import RELEASE, Base, is_head
from portllm.checkpoint.base.layout import StoredBlock, whole
from portllm.checkpoint.files.tensors import TensorEntry, times
from portllm.checkpoint.planning.changes import Change, ChangeSet
from portllm.checkpoint.planning.low_rank import block_reader
from portllm.errors import ShapeError, UnsupportedPatchError

if TYPE_CHECKING:
    from torch import Tensor

    from portllm.algebra.edits import Edit

HEADS_OF_CLASSIFIERS = frozenset({"score", "classifier"})
CAUSAL = ("ForCausalLM", "LMHeadModel")


def add_replacements(changes: ChangeSet, patch: Patch) -> None:
    """Add the changes by tensors and rows that replace the base's. Raises ShapeError, UnsupportedPatchError."""
    replacements = _Replacements(changes, patch)
    for parameter, entry in patch.replaced.items():
        replacements.add_parameter(parameter, entry)
    for module, saved in patch.saved.items():
        replacements.add_new_rows(module, saved)
    for module, tokens in patch.tokens.items():
        replacements.add_tokens(module, tokens)


def grew(entry: TensorEntry, shape: tuple[int, ...]) -> bool:
    """Return whether a saved copy has more rows than the base's tensor, and the same columns."""
    return len(entry.shape) == len(shape) == 2 and entry.shape[1] == shape[1] and entry.shape[0] > shape[0]


def is_new_head(parameter: str, patch: Patch, base: Base) -> bool:
    """Return whether a parameter is the head of a classifier that the base does not have."""
    return (
        patch.config.get("task_type") == "SEQ_CLS"
        and parameter.rpartition(".")[0] in HEADS_OF_CLASSIFIERS
        and parameter not in base.layout.blocks
        and parameter not in base.tensors
    )


def check_vocabulary(changes: ChangeSet) -> None:
    """Raise ShapeError unless a vocabulary that grew has grown in every embedding and head."""
    base = changes.base
    rows, old = changes.config.get("vocab_size"), base.config.get("vocab_size")
    for name, entry in base.tensors.items() if rows is not None else ():
        shape = changes.changes[name].shape if name in changes.changes else entry.shape
        module = base.layout.modules.get(name.rpartition(".")[0])
        if (is_head(name) or (module and module.kind == "embedding")) and shape[:1] == (old,):
            raise ShapeError(
                f"{name}: has {old} rows, the patch's vocabulary {rows}; expected one vocabulary, save the "
                "embedding and the head with the patch (modules_to_save)"
            )


class _Replacements:
    """The replacements of one patch."""

    def __init__(self, changes: ChangeSet, patch: Patch) -> None:
        self._changes, self._base, self._patch = changes, changes.base, patch

    def add_parameter(self, parameter: str, entry: TensorEntry) -> None:
        """Replace a parameter that was saved complete (modules_to_save, trained biases)."""
        self._changes.modules.add(parameter.rpartition(".")[0])
        if is_new_head(parameter, self._patch, self._base):
            self._add_head(parameter, entry)
            return
        blocks, shape = self._base.find(parameter)
        grown = entry.shape != shape
        if grown:
            self._grow(parameter, entry, shape)
            self._base.complete_tensor(parameter, blocks, "a grown vocabulary")
        for block in blocks:
            self._base.complete_tensor(parameter, (block,), "a module saved completely")
            reads = not grown and block.tensor not in self._base.tied_heads
            own = entry.shape if len(blocks) == 1 and not block.transposed else self._base.shape(block.tensor)
            edit = _replacing(entry, whole(block.tensor, own) if grown else block)
            self._changes.add(block.tensor, edit, "replaced", (entry.name,), shape=own, reads=reads)

    def add_new_rows(self, module: str, saved: TensorEntry) -> None:
        """Add the rows that a saved copy of a base weight has more than the base."""
        parameter = f"{module}.weight"
        if parameter in self._base.layout.tied or parameter in self._patch.replaced or not self._base.has(parameter):
            return  # it grows with its embedding, or is the patch's own
        blocks, shape = self._base.find(parameter)
        if not grew(saved, shape):
            return
        tensor = self._base.complete_tensor(parameter, blocks, "a grown vocabulary")
        self._grow(parameter, saved, shape)
        tokens = self._patch.tokens.get(module)
        if tokens is not None:
            _check_rows(module, tokens, saved.shape)
        sources = (saved.name, *([tokens.entry.name] if tokens is not None else []))
        self._changes.extended.append(module)
        edit = partial(_extended, self._base.tensors[tensor], saved, tokens)
        self._changes.add(
            tensor, edit, f"{saved.shape[0] - shape[0]} rows added", sources, shape=saved.shape, reads=False
        )

    def add_tokens(self, module: str, tokens: TokenRows) -> None:
        """Replace the rows of trained tokens (trainable_token_indices)."""
        self._changes.modules.add(self._base.in_memory(module))
        if module in self._changes.extended:
            return
        blocks, shape = self._base.find(f"{module}.weight")
        tensor = self._base.complete_tensor(module, blocks, "trainable_token_indices")
        self._base.refuse_bias(module)
        _check_rows(module, tokens, shape)

        def edit() -> Edit:
            from portllm.algebra.edits import ReplaceRows

            return ReplaceRows(dict(zip(tokens.indices, tokens.values, strict=True)))

        self._changes.add(tensor, edit, f"{len(tokens.indices)} rows replaced", (tokens.entry.name,))

    def _grow(self, parameter: str, entry: TensorEntry, shape: tuple[int, ...]) -> None:
        """Accept a vocabulary that grew, in embedding and head alike; no other parameter may change its shape."""
        vocabulary = self._base.kind(parameter.rpartition(".")[0]) == "embedding" or is_head(parameter)
        if not vocabulary or len(entry.shape) != 2 or entry.shape[1] != shape[1] or entry.shape[0] < shape[0]:
            raise ShapeError(
                f"{parameter}: the patch saved {times(entry.shape)}, the base has {times(shape)}; {RELEASE}"
            )
        if isinstance(self._base.config.get("text_config"), dict):
            raise UnsupportedPatchError(
                f"{parameter}: the patch has a vocabulary of {entry.shape[0]}, and that of {self._base.path} is in its "
                "text_config, where portllm does not grow it; train on the base's own vocabulary"
            )
        self._changes.config["vocab_size"] = entry.shape[0]

    def _add_head(self, parameter: str, entry: TensorEntry) -> None:
        """Add the head of a classifier: a tensor, and the keys of config.json that load it."""
        self._changes.config |= classifier(self._base, parameter, entry)
        checkpoint = self._base.checkpoint
        dtype = checkpoint.entry(checkpoint.names[0]).dtype
        edit = _replacing(entry, whole(parameter, entry.shape))
        self._changes.changes[parameter] = Change(parameter, dtype, entry.shape, None, edit, "added", (entry.name,))


def classifier(base: Base, parameter: str, entry: TensorEntry) -> dict[str, Any]:
    """Return the changes of config.json for a head of shape (labels, hidden). Raises UnsupportedPatchError."""
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


def _check_rows(module: str, tokens: TokenRows, shape: tuple[int, ...]) -> None:
    if tokens.indices and max(tokens.indices) >= shape[0] or tokens.entry.shape != (len(tokens.indices), shape[1]):
        raise ShapeError(
            f"{module}: the patch trained {times(tokens.entry.shape)} rows up to {max(tokens.indices, default=0)}, "
            f"the base has {times(shape)}; {RELEASE}"
        )


def _replacing(entry: TensorEntry, block: StoredBlock) -> Callable[[], Edit]:
    def edit() -> Edit:
        from portllm.algebra.edits import Replace

        return Replace(block_reader(entry, block))

    return edit


def _extended(base: TensorEntry, saved: TensorEntry, tokens: TokenRows | None) -> Edit:
    """Return the grown tensor: rows of `base`, then those that `saved` has more, and over both the rows of `tokens`."""
    import torch

    from portllm.algebra.edits import Replace

    old, rows = base.shape[0], saved.shape[0]
    trained = dict(zip(tokens.indices, tokens.values, strict=True)) if tokens is not None else {}

    def read(row: int, count: int) -> Tensor:
        stop = rows if count < 0 else row + count
        parts = []
        if row < old:
            parts.append(base.rows(row, min(stop, old) - row).double())
        if stop > old:
            first = max(row, old)
            parts.append(saved.rows(first, stop - first).double())
        values = torch.cat(parts)
        for index in range(row, stop):
            if index in trained:
                values[index - row] = trained[index].double()
        return values

    return Replace(read)
