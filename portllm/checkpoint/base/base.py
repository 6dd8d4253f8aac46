"""A base: a checkpoint with its layout, which finds the tensors on disk that a parameter of the model in memory is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.base.layout import HEAD, Kind, Layout, StoredBlock, on_disk, plain, stored_tensor, whole
from portllm.checkpoint.files.tensors import TensorEntry
from portllm.errors import UnmatchedModulesError, UnsupportedPatchError

RELEASE = "is this a release of the base the patch was trained on?"


@dataclass(frozen=True)
class Base:
    """A checkpoint and its layout. Parameters go by their names in memory, tensors by those on disk."""

    checkpoint: Checkpoint
    layout: Layout

    @classmethod
    def plain(cls, checkpoint: Checkpoint) -> Base:
        """Return a base whose names on disk are those in memory (see layout.plain)."""
        return cls(checkpoint, plain(checkpoint))

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""
        return self.checkpoint.path

    @property
    def config(self) -> Mapping[str, Any]:
        """The checkpoint's config.json."""
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """The checkpoint's tensors by name."""
        return self.checkpoint.tensors

    @cached_property
    def tied_heads(self) -> Mapping[str, str]:
        """For the tensor that each tied head gets once it is untied: the tensor of its embedding."""
        tied = self.layout.tied.items()
        pairs = ((self.head_tensor(head), stored_tensor(embedding, self.layout)) for head, embedding in tied)
        return {head: embedding for head, embedding in pairs if embedding is not None}

    @cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset(block.tensor for blocks in self.layout.blocks.values() for block in blocks)

    @cached_property
    def _parameters(self) -> Mapping[str, str]:
        return {blocks[0].tensor: name for name, blocks in self.layout.blocks.items() if len(blocks) == 1}

    @property
    def linears(self) -> frozenset[str]:
        """The names of the linear modules (transformers' Conv1D included)."""
        modules = self.layout.modules.items()
        return frozenset(name for name, module in modules if module.kind in ("linear", "conv1d"))

    def has(self, parameter: str) -> bool:
        """Return whether the base has this parameter, under its name in memory or on disk."""
        layout = self.layout
        return any(parameter in names for names in (layout.tied, layout.blocks, layout.opaque, self._stored))

    def find(self, parameter: str) -> tuple[tuple[StoredBlock, ...], tuple[int, ...]]:
        """Return (the parameter's blocks on disk, its shape in memory); for a tied head, a tensor of its own.

        Raises UnmatchedModulesError, UnsupportedPatchError.
        """
        layout = self.layout
        if parameter in layout.tied:
            head = self.head_tensor(parameter)
            if head not in self.tied_heads:
                raise UnmatchedModulesError(f"{parameter}: is tied to a parameter that is not on disk; {RELEASE}")
            return (whole(head, self.shape(head)),), self.shape(head)
        if parameter in layout.opaque:
            raise UnsupportedPatchError(
                f"{parameter}: is stored {layout.opaque[parameter]} in {self.path}, which portllm does not "
                "port; train the patch without it"
            )
        if parameter in layout.blocks:
            module, _, leaf = parameter.rpartition(".")
            return layout.blocks[parameter], layout.modules[module].parameters[leaf]
        if parameter in self._stored:  # a name of an older transformers, or of the model without its head
            return (whole(parameter, self.shape(parameter)),), self.shape(parameter)
        raise UnmatchedModulesError(f"{parameter}: is not in {self.path}; {RELEASE}")

    def complete_tensor(self, name: str, blocks: tuple[StoredBlock, ...], what: str) -> str:
        """Return the tensor that all of `blocks` is. Raises UnsupportedPatchError, naming `what` needs it complete."""
        if len(blocks) != 1 or blocks[0].of != tuple((0, n) for n in self.shape(blocks[0].tensor)):
            raise UnsupportedPatchError(
                f"{name}: is stored in {len(blocks)} parts in {self.path}, and {what} needs it whole; not supported"
            )
        return blocks[0].tensor

    def stored_tensor(self, parameter: str) -> str | None:
        """Return the tensor on disk that is this complete parameter, or the one it is tied to (see layout)."""
        return stored_tensor(parameter, self.layout)

    def kind(self, module: str) -> Kind:
        """Return a module's kind; one of no known kind counts as linear."""
        own = self.layout.modules.get(self.in_memory(module))
        return own.kind if own is not None and own.kind != "other" else "linear"

    def in_memory(self, module: str) -> str:
        """Return the module's name in memory, where the patch uses that of its tensor on disk."""
        if module in self.layout.modules:
            return module
        return self._parameters.get(f"{module}.weight", f"{module}.").rpartition(".")[0]

    def refuse_bias(self, module: str) -> None:
        """Raise UnsupportedPatchError for a linear module with a bias: with trained tokens PEFT computes without it."""
        own = self.layout.modules.get(self.in_memory(module))
        if own is not None and own.kind == "linear" and "bias" in own.parameters:
            raise UnsupportedPatchError(
                f"{module}: has a bias, and PEFT leaves it out where tokens are trained (trainable_token_indices); "
                "expected an output head without a bias, train the embedding with modules_to_save"
            )

    def head_tensor(self, parameter: str) -> str:
        """Return the name on disk of a tied head once it has a tensor of its own."""
        return self.layout.absent.get(parameter) or on_disk(parameter, self.checkpoint)

    def origin(self, tensor: str) -> TensorEntry:
        """Return the entry of a tensor on disk, or of the one that a tied head is read from. Raises CheckpointError."""
        return self.checkpoint.entry(self.tied_heads.get(tensor, tensor))

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a tensor on disk, or of the one that a tied head will get. Raises CheckpointError."""
        return self.origin(tensor).shape


def is_head(parameter: str) -> bool:
    """Return whether a parameter is an output head's, by the name of its module."""
    return parameter.rpartition(".")[0].rpartition(".")[2] in (HEAD, "embed_out")
