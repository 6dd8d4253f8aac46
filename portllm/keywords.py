"""The sections of params.yaml as typed keyword arguments of the Python API: `train(…, learning_rate=1e-3, lora_r=4)`.

Names are those of the command line's options, types and defaults those of the dataclasses in params.py; a test compares
them. A key that is left out, or None, keeps the section's own value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, get_origin

from portllm.errors import ParamsError
from portllm.params import Params, load
from portllm.parsing import leaves, with_values
from portllm.suggestions import nearest

Section = TypeVar("Section")


class OptimOptions(TypedDict, total=False):
    """One optimisation (OptimParams)."""

    learning_rate: float
    epochs: float
    max_steps: int
    batch_size: int
    gradient_accumulation: int
    schedule: Literal["linear", "cosine", "constant", "warmup_stable_decay"]
    warmup_ratio: float
    decay_ratio: float
    weight_decay: float
    beta1: float
    beta2: float
    max_grad_norm: float
    logging_steps: int
    threads: int
    precision: Literal["auto", "fp32", "bf16"]
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"]
    gradient_checkpointing: bool
    group_by_length: bool
    save_steps: int


class LoraOptions(TypedDict, total=False):
    """LoRA (LoraParams)."""

    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_target_modules: str | Sequence[str]
    lora_use_rslora: bool


class ArchitectureOptions(TypedDict, total=False):
    """Shape of a model pretrained from scratch (ArchitectureParams)."""

    architecture_hidden_size: int
    architecture_intermediate_size: int
    architecture_layers: int
    architecture_heads: int
    architecture_kv_heads: int
    architecture_initializer_range: float
    architecture_max_positions: int
    architecture_tie_word_embeddings: bool


class PrepareOptions(TypedDict, total=False):
    """Section `prepare` (PrepareParams)."""

    seed: int
    train_rows: int
    test_rows: int
    documents: int
    data: str
    limit: int
    output_type: Literal["loglikelihood", "generate_until", "multiple_choice"]
    held_out: float


class FetchOptions(OptimOptions, ArchitectureOptions, total=False):
    """Section `fetch` (FetchParams)."""

    vocab_size: int
    seed: int
    block_length: int


class EvolveOptions(OptimOptions, LoraOptions, total=False):
    """Section `evolve` (EvolveParams)."""

    mode: Literal["full", "lora"]
    seed: int
    block_length: int


class TrainOptions(OptimOptions, LoraOptions, total=False):
    """Section `train` (TrainParams)."""

    seed: int
    max_length: int
    quantization: Literal["none", "4bit"]


class PortOptions(TypedDict, total=False):
    """Section `port` (PortParams)."""

    as_: Literal["merged", "adapter"]
    method: Literal["direct"]
    scale: float


class EvaluateOptions(TypedDict, total=False):
    """Section `evaluate` (EvaluateParams)."""

    seed: int
    num_fewshot: int
    batch_size: int
    limit: int
    threads: int


class ReportOptions(TypedDict, total=False):
    """Section `report` (ReportParams)."""

    probe_threshold: float
    bootstrap_samples: int
    seed: int


class RegisterOptions(TypedDict, total=False):
    """Section `register` (RegisterParams)."""

    name: str
    alias: str
    margin: float


def section_of(params: Any, verb: str, kind: type[Section], options: Mapping[str, object]) -> tuple[Params, Section]:
    """Return all parameters, and the section of `verb`, a `kind`, with the `options` that were given.

    `params` is that section, all sections, the path of a params.yaml, or None for the defaults. Raises ParamsError,
    and TypeError for an option that the section does not have.
    """
    if isinstance(params, kind):
        return Params(), with_options(params, options, verb)
    if params is None or isinstance(params, (str, Path)):
        params = load(None if params is None else Path(params))
    if not isinstance(params, Params):
        found = type(params).__name__
        raise ParamsError(f"{verb}: params is a {found}, expected {kind.__name__}, Params or the path of a params.yaml")
    return params, with_options(getattr(params, verb), options, verb)


def with_options(section: Section, options: Mapping[str, object], verb: str) -> Section:
    """Return `section` with the `options` that were given. Raises ParamsError, TypeError for an unknown name."""
    by_name = {leaf.argument: leaf for leaf in leaves(type(section))}
    for name in options:
        if name not in by_name:
            near = nearest(name, by_name)
            hint = f"; did you mean {near!r}?" if near else ""
            raise TypeError(f"{verb}() got an unexpected keyword argument {name!r}{hint}")
    values = {
        by_name[name].path: words(value) if get_origin(by_name[name].hint) is tuple else value
        for name, value in options.items()
    }
    return with_values(section, values, where=verb)


def words(value: Any) -> Any:
    """Return names given as one string, as the command line takes them (`a,b`), as a list; anything else as it is."""
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value
