"""Where a model's parameters are on disk: the names in memory (transformers', PEFT's) beside those in the files.

For most architectures the two are the same, and `plain` needs no library to say so. Where transformers renames, fuses or
splits tensors on loading, `portllm.lm.layout` asks transformers itself and fills the same objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class Part:
    """A block of one tensor on disk that is a block of one parameter in memory.

    parameter[at] equals tensor[of], its last two axes swapped where `transposed`. `at` indexes the parameter: an int drops
    that axis (an expert), a pair is [start, stop). `of` indexes the tensor on disk, pairs only.
    """

    tensor: str
    at: tuple[int | tuple[int, int], ...]
    of: tuple[tuple[int, int], ...]
    transposed: bool = False


@dataclass(frozen=True)
class Module:
    """A module of the model in memory that holds parameters of its own: its kind and their names and shapes.

    `transposed` is transformers' `is_transposed` of fused experts: a weight is (experts, in, out), not (experts, out, in).
    """

    kind: Kind
    parameters: Mapping[str, tuple[int, ...]]
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """A model's modules and where their parameters are on disk.

    `parts` is keyed by the parameter's full name in memory; a parameter absent from it is not on disk. `tied` maps the
    parameter that is another one in memory (an output head, usually) to that other.
    """

    modules: Mapping[str, Module]
    parts: Mapping[str, tuple[Part, ...]]
    tied: Mapping[str, str]
