"""params.yaml as frozen dataclasses: one section per pipeline stage, each default in one place.

The defaults are the values of the PortLLM paper (arXiv:2410.10870, LoRA on a 7B model); params.yaml
in the repository overrides them with the embedded world's. An unknown or ill-typed key is an error
that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from portllm import ranges
from portllm.errors import ParamsError

Section = TypeVar("Section")

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class CorpusParams:
    """Text a release is made from: a name under `prepare.data`, a known corpus or a hub id; `rows` 0: all of them.

    Several are joined by `+`: their training splits, one after the other.
    """

    source: str
    revision: str | None = None
    rows: int = 0
    test_rows: int = 200


@dataclass(frozen=True, kw_only=True)
class PrepareParams:
    """Where datasets come from: the embedded world, DATA/<name>/<split>.parquet|jsonl|csv, or the hub.

    `train_rows`, `test_rows` and `documents` size the embedded world; `limit` (0: none) cuts real training splits;
    `revisions` pins the hub's datasets by task; `corpora` says what each release reads. A user's own rows are asked
    as `output_type` says; where they come as one file, the share `held_out` is set apart for validation and for test.
    """

    seed: int = 0
    train_rows: int = 2000
    test_rows: int = 480
    documents: int = 24000
    data: str = "data/local"
    limit: int = 0
    output_type: Literal["loglikelihood", "generate_until", "multiple_choice"] = "loglikelihood"
    held_out: float = 0.1
    revisions: Mapping[str, str] = field(default_factory=dict)
    corpora: Mapping[str, CorpusParams] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 0.5:
            raise ParamsError(f"prepare.held_out is {self.held_out}; expected a share above 0 and below 0.5")
        if self.limit < 0:
            raise ParamsError(f"prepare.limit is {self.limit}; expected a number of rows, or 0 for all")


@dataclass(frozen=True, kw_only=True)
class OptimParams:
    """One optimisation: AdamW with warm-up; `max_steps` 0: `epochs` decide; `threads` 0: as many as torch takes.

    `batch_size` rows make one step's batch, over all processes, times `gradient_accumulation`. `precision` auto: bf16
    where a GPU has it, else fp32. `save_steps` 0: no checkpoint to resume from.
    """

    learning_rate: float = 1e-4
    epochs: float = 10.0
    max_steps: int = 0
    batch_size: int = 4
    gradient_accumulation: int = 1
    schedule: Literal["linear", "cosine", "constant", "warmup_stable_decay"] = "linear"
    warmup_ratio: float = 0.0
    decay_ratio: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    logging_steps: int = 10
    threads: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    save_steps: int = 0

    def __post_init__(self) -> None:
        ranges.hold(self, "optim", ranges.OPTIM)
        if not (self.epochs or self.max_steps):
            raise ParamsError("optim.epochs and optim.max_steps are both 0; expected one of them above 0")


@dataclass(frozen=True, kw_only=True)
class LoraParams:
    """LoRA (arXiv:2106.09685): Δ = alpha/r · B·A on every target module."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.1
    target_modules: tuple[str, ...] = ALL_LINEARS
    use_rslora: bool = False

    def __post_init__(self) -> None:
        ranges.hold(self, "lora", ranges.LORA)


@dataclass(frozen=True, kw_only=True)
class ArchitectureParams:
    """Shape of a Llama pretrained from scratch as v0: by default the embedded world's.

    `kv_heads` 0: as many as heads. `max_positions` 0: as the tokenizer says; `scratch` takes the block length.
    """

    hidden_size: int = 64
    intermediate_size: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 0
    initializer_range: float = 0.08
    max_positions: int = 0
    tie_word_embeddings: bool = False


@dataclass(frozen=True, kw_only=True)
class FetchParams:
    """v0: `world` and `scratch` pretrain it, on the world's words or on `vocab_size` byte-pair tokens of the corpus.

    Anything else is a directory or hub-id[@revision].
    """

    source: str = "world"
    vocab_size: int = 4096
    seed: int = 1234
    block_length: int = 64
    architecture: ArchitectureParams = field(default_factory=ArchitectureParams)
    optim: OptimParams = field(default_factory=OptimParams)


@dataclass(frozen=True, kw_only=True)
class ReleaseParams:
    """How one release comes from the release before it: trained on its corpus, or `source`, a real release."""

    base: str
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvolveParams:
    """Continued pretraining: full-weight, or LoRA merged into the weights (as in the paper)."""

    mode: Literal["full", "lora"] = "full"
    seed: int = 1234
    block_length: int = 64
    optim: OptimParams = field(default_factory=OptimParams)
    lora: LoraParams = field(default_factory=lambda: LoraParams(r=64, alpha=128))
    releases: Mapping[str, ReleaseParams] = field(default_factory=dict)

    def recipe(self, release: str | None) -> ReleaseParams | None:
        """How `release` comes to be; None for no name. Raises ParamsError for a name without a recipe."""
        if release is not None and release not in self.releases:
            known = _nearest(release, self.releases, "evolve.releases") if self.releases else "; pass --params FILE"
            raise ParamsError(f"evolve.releases has no {release}{known}")
        return None if release is None else self.releases[release]


@dataclass(frozen=True, kw_only=True)
class TaskOverrides:
    """What one task trains with instead of the section's own values."""

    lora: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    """A LoRA patch on one task: loss on the answer only, dynamic padding."""

    seed: int = 1234
    max_length: int = 256
    quantization: Literal["none", "4bit"] = "none"
    lora: LoraParams = field(default_factory=LoraParams)
    optim: OptimParams = field(default_factory=OptimParams)
    per_task: Mapping[str, TaskOverrides] = field(default_factory=dict)

    def for_task(self, task: str) -> TrainParams:
        """The same section with the overrides of `task` applied. Raises ParamsError."""
        over = self.per_task.get(task)
        if over is None:
            return self
        where = f"train.per_task.{task}"
        return dataclasses.replace(
            self,
            lora=override(self.lora, over.lora, where=f"{where}.lora"),
            optim=override(self.optim, over.optim, where=f"{where}.optim"),
        )


@dataclass(frozen=True, kw_only=True)
class PortParams:
    """How a patch is put onto another release: θ' + scale · Δ."""

    as_: Literal["merged", "adapter"] = "merged"
    method: Literal["direct"] = "direct"
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    """LM Evaluation Harness settings; `limit` 0: every row; `threads` 0: as many as torch takes.

    `num_fewshot` -1: as many as the task's own definition says; `batch_size` 0: found automatically.
    """

    seed: int = 1234
    num_fewshot: int = 0
    batch_size: int = 64
    limit: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        ranges.hold(self, "evaluate", ranges.EVALUATE)


@dataclass(frozen=True, kw_only=True)
class ReportParams:
    """What the report calls a task the base knows enough for, and how it resamples."""

    probe_threshold: float = 0.9
    bootstrap_samples: int = 2000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RegisterParams:
    """Registry names, of {task} and perhaps {release}: the last model of a name gets the alias.

    `margin` is how far (0..1) a ported arm must be above its base arm.
    """

    name: str = "portllm-{task}"
    alias: str = "champion"
    margin: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Params:
    """The whole of params.yaml."""

    tasks: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    prepare: PrepareParams = field(default_factory=PrepareParams)
    fetch: FetchParams = field(default_factory=FetchParams)
    evolve: EvolveParams = field(default_factory=EvolveParams)
    train: TrainParams = field(default_factory=TrainParams)
    port: PortParams = field(default_factory=PortParams)
    evaluate: EvaluateParams = field(default_factory=EvaluateParams)
    report: ReportParams = field(default_factory=ReportParams)
    register: RegisterParams = field(default_factory=RegisterParams)

    def __post_init__(self) -> None:
        for name in self.releases[1:]:
            recipe = self.evolve.releases.get(name)
            if recipe is None:
                raise ParamsError(
                    f"releases names {name}, but evolve.releases has no recipe for it; "
                    f"add evolve.releases.{name} with its base"
                )
            if recipe.base not in self.releases:
                raise ParamsError(
                    f"evolve.releases.{name}.base is {recipe.base!r}; expected one of {', '.join(self.releases)}"
                )


def load(path: Path | None) -> Params:
    """The parameters in `path`, or the paper's defaults for None. Raises ParamsError."""
    if path is None:
        return Params()
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read ({error.strerror}); pass --params FILE") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ParamsError(f"{path}: not valid YAML ({text}); mend the file") from error
    return parse(Params, tree if tree is not None else {}, where="", source=str(path))


def override(section: Section, values: Mapping[str, Any], *, where: str) -> Section:
    """`section` with some of its fields replaced, checked as if read from a file. Raises ParamsError."""
    tree = {_key(name): value for name, value in as_tree(section).items()}
    for key, value in values.items():
        both_nested = isinstance(value, Mapping) and isinstance(tree.get(key), Mapping)
        tree[key] = {**tree[key], **value} if both_nested else value
    return parse(type(section), tree, where=where, source="params")


def as_tree(section: Any) -> dict[str, Any]:
    """A section as plain dicts and lists, with the keys params.yaml uses."""
    if not dataclasses.is_dataclass(section):
        raise TypeError(f"{section!r} is not a section")
    return {_key(f.name): _plain(getattr(section, f.name)) for f in dataclasses.fields(section)}


def parse(kind: type[Section], tree: Any, *, where: str, source: str) -> Section:
    """`tree` (from YAML) as the dataclass `kind`. Raises ParamsError naming the key and the nearest known one."""
    if not isinstance(tree, Mapping):
        raise ParamsError(f"{source}: {where or 'the top level'} must be a mapping, found {_name(tree)}")
    hints = get_type_hints(kind)
    known = {_key(f.name): f for f in dataclasses.fields(typing.cast(Any, kind))}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise ParamsError(f"{source}: unknown key {path}{_nearest(str(key), known, where)}")
        values[known[key].name] = _convert(hints[known[key].name], value, where=path, source=source)
    missing = [k for k, f in known.items() if f.name not in values and _required(f)]
    if missing:
        raise ParamsError(f"{source}: {where or 'the top level'} lacks {', '.join(missing)}; add it")
    return kind(**values)


def _convert(hint: Any, value: Any, *, where: str, source: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(Any, hint), value, where=where, source=source)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        return None if value is None else _convert(inner[0], value, where=where, source=source)
    if origin is Literal:
        return _choice(get_args(hint), value, where=where, source=source)
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        item = get_args(hint)[0]
        return tuple(_convert(item, v, where=f"{where}[{i}]", source=source) for i, v in enumerate(value))
    if origin is Mapping and isinstance(value, typing.Mapping):
        item = get_args(hint)[1]
        return {str(k): _convert(item, v, where=f"{where}.{k}", source=source) for k, v in value.items()}
    return _scalar(hint, value, where=where, source=source)


def _choice(choices: tuple[Any, ...], value: Any, *, where: str, source: str) -> Any:
    if value not in choices:
        raise ParamsError(f"{source}: {where} must be one of {', '.join(map(str, choices))}, found {value!r}")
    return value


def _scalar(hint: Any, value: Any, *, where: str, source: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 (no dot) as text; every user means the number
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = getattr(get_origin(hint) or hint, "__name__", str(hint))
    wanted = {"tuple": "list", "Mapping": "mapping"}.get(wanted, wanted)
    raise ParamsError(f"{source}: {where} must be a {wanted}, found {value!r}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_tree(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _nearest(key: str, known: Mapping[str, Any], where: str) -> str:
    prefix = f"{where}." if where else ""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; known here: {', '.join(prefix + k for k in known)}"


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _key(name: str) -> str:
    # a Python keyword such as `as` is spelt `as_` in the dataclass and `as` in the file
    return name.rstrip("_")


def _name(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
