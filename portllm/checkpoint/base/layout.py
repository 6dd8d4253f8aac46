"""Where a model's parameters are on disk: the names in memory (transformers', PEFT's) next to those in the files.

For most architectures the two are the same, and `plain` needs no library to say so. Where transformers renames, fuses
or splits tensors on loading, `portllm.lm.names.layout` has transformers itself rename them and fills the same objects.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from portllm.checkpoint.base.checkpoint import Checkpoint

Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class StoredBlock:
    """A block of one tensor on disk that is a block of one parameter in memory.

    parameter[at] equals tensor[of], its last two axes swapped where `transposed`. `at` indexes the parameter: an int
    drops that axis (an expert), a pair is [start, stop). `of` indexes the tensor on disk, pairs only.
    """

    tensor: str
    at: tuple[int | tuple[int, int], ...]
    of: tuple[tuple[int, int], ...]
    transposed: bool = False


@dataclass(frozen=True)
class Module:
    """A module of the model in memory that has parameters of its own: its kind and their names and shapes.

    `transposed` is transformers' `is_transposed` of fused experts: a weight is (experts, in, out), not the other way.
    """

    kind: Kind
    parameters: Mapping[str, tuple[int, ...]]
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """A model's modules and where their parameters are on disk.

    `blocks` is keyed by the parameter's full name in memory; a parameter absent from it is not on disk. `tied` maps the
    parameter that is another one in memory (an output head, usually) to that other, which is the one on disk.
    `opaque` describes how a parameter is stored that is on disk but not as blocks; `absent` gives a parameter that is
    not on disk the name it would have there; `architecture` is the class in memory (both empty for a plain layout).
    """

    modules: Mapping[str, Module]
    blocks: Mapping[str, tuple[StoredBlock, ...]]
    tied: Mapping[str, str]
    opaque: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    architecture: str = ""


# model types whose tensors are in memory as they are on disk (a test compares each with transformers)
PLAIN = frozenset({
    "gemma", "gemma2", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3",
})  # fmt: skip
# of these, those whose class unties the head when config.json has no entry for it
UNTIED_BY_DEFAULT = PLAIN - {"gemma", "gemma2", "gpt2"}

# transformers' Conv1D keeps its weight as (in, out)
CONV1D = {"gpt2": frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})}
# published without their language-model class: transformers adds the prefix when no tensor has it
PREFIX = {"gpt2": "transformer."}
HEAD_ON_DISK = {"gpt_neox": "embed_out"}
EMBEDDING = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}
HEAD = "lm_head"


def plain(base: Checkpoint) -> Layout:
    """Return the layout of a checkpoint whose names on disk are those in memory, but for the few exceptions above."""
    kind = str(base.config.get("model_type"))
    prefix = PREFIX.get(kind, "")
    if any(name.startswith(prefix) for name in base.tensors):
        prefix = ""
    shapes: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    blocks: dict[str, tuple[StoredBlock, ...]] = {}
    for disk in base.tensors:
        module, _, leaf = _in_memory(disk, kind, prefix).rpartition(".")
        shape = base.entry(disk).shape
        shapes[module][leaf] = shape
        blocks[f"{module}.{leaf}"] = (whole(disk, shape),)
    modules = {name: Module(_kind(name, kind, own), own) for name, own in shapes.items()}
    tied: dict[str, str] = {}
    embedding, head = f"{EMBEDDING.get(kind, 'model.embed_tokens')}.weight", f"{HEAD}.weight"
    if _ties(base.config, kind) and embedding in blocks and _same(base, blocks.get(head), blocks[embedding]):
        tied[head] = embedding
        blocks.pop(head, None)
        modules[HEAD] = Module("linear", {"weight": base.entry(blocks[embedding][0].tensor).shape})
    return Layout(modules, blocks, tied)


def whole(tensor: str, shape: tuple[int, ...]) -> StoredBlock:
    """Return the block that is a complete tensor and a complete parameter."""
    spans = tuple((0, n) for n in shape)
    return StoredBlock(tensor, spans, spans)


def on_disk(parameter: str, base: Checkpoint) -> str:
    """Return the name on disk of a parameter that is not there yet, in a model whose other names are plain."""
    kind = str(base.config.get("model_type"))
    module, _, leaf = parameter.rpartition(".")
    return f"{HEAD_ON_DISK.get(kind, module) if module == HEAD else module}.{leaf}"


def _in_memory(disk: str, kind: str, prefix: str) -> str:
    head = HEAD_ON_DISK.get(kind)
    if head and disk.startswith(f"{head}."):
        return HEAD + disk.removeprefix(head)
    return disk if disk.startswith(f"{HEAD}.") else prefix + disk


def _kind(module: str, kind: str, own: Mapping[str, tuple[int, ...]]) -> Kind:
    leaf = module.rpartition(".")[2]
    if len(own.get("weight", ())) != 2:
        return "other"
    if leaf in CONV1D.get(kind, ()):
        return "conv1d"
    return "embedding" if is_embedding(module) else "linear"


def is_embedding(module: str) -> bool:
    """Return whether a module's name is that of an embedding table."""
    leaf = module.rpartition(".")[2]
    return leaf != HEAD and leaf != "embed_out" and ("embed" in leaf or leaf in ("wte", "wpe", "shared"))


def _same(base: Checkpoint, head: tuple[StoredBlock, ...] | None, embedding: tuple[StoredBlock, ...]) -> bool:
    """Return whether a head is its embedding: not on disk, or a copy there (transformers keeps two different ones)."""
    if head is None:
        return True
    return base.entry(head[0].tensor).equals(base.entry(embedding[0].tensor))


def _ties(config: Mapping[str, object], kind: str) -> bool:
    tied = config.get("tie_word_embeddings")
    return kind not in UNTIED_BY_DEFAULT if tied is None else bool(tied)


def stored_tensor(parameter: str, layout: Layout) -> str | None:
    """Return the tensor on disk that is this complete parameter, or the one it is tied to; None for several or none."""
    blocks = layout.blocks.get(layout.tied.get(parameter, parameter), ())
    if len(blocks) == 1 and not blocks[0].transposed and all(isinstance(axis, tuple) for axis in blocks[0].at):
        return blocks[0].tensor
    return None
