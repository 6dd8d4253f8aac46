"""params.yaml as frozen dataclasses: one section per pipeline stage, each default in one place.

The defaults are the values of the PortLLM paper (arXiv:2410.10870, LoRA on a 7B model); params.yaml in the repository
overrides them with the embedded world's. portllm.parsing reads and checks a section.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from portllm.errors import ParamsError
from portllm.parsing import BELOW_ONE, ONE, SHARE, ZERO, Rule, check, hint_of
from portllm.parsing import as_tree as as_tree
from portllm.parsing import override as override
from portllm.parsing import parse as parse

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SHOTS: Rule = ("a number of examples, or -1 for the task's own", lambda value: value >= -1)
OPTIM: Mapping[str, Rule] = {
    **dict.fromkeys(("batch_size", "gradient_accumulation", "logging_steps"), ONE),
    **dict.fromkeys(("learning_rate", "epochs", "max_steps", "threads", "save_steps"), ZERO),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), ZERO),
    **dict.fromkeys(("warmup_ratio", "beta1", "beta2"), BELOW_ONE),
    "decay_ratio": SHARE,
}
LORA: Mapping[str, Rule] = {"r": ONE, "dropout": BELOW_ONE}
EVALUATE: Mapping[str, Rule] = {**dict.fromkeys(("batch_size", "limit", "threads"), ZERO), "num_fewshot": SHOTS}


@dataclass(frozen=True, kw_only=True)
class CorpusParams:
    """The text of a release: a name under `prepare.data`, a known corpus or a hub id; `rows` 0: all.

    Several sources are joined by `+`: their training splits follow one another.
    """

    source: str
    revision: str | None = None
    rows: int = 0
    test_rows: int = 200


@dataclass(frozen=True, kw_only=True)
class PrepareParams:
    """The source of datasets: the embedded world, DATA/<name>/<split>.parquet|jsonl|csv, or the hub.

    `train_rows`, `test_rows` and `documents` size the embedded world; `limit` (0: none) cuts real training splits;
    `revisions` pins the hub's datasets by task; `corpora` has each release's text. A user's own rows are evaluated by
    `output_type`; of a single file, the share `held_out` is held out for validation and for test, each.
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
    """One optimisation: AdamW with warm-up; `max_steps` 0: `epochs` apply; `threads` 0: torch's default.

    A step has `batch_size` rows, over all processes, times `gradient_accumulation`. `precision` auto: bf16 where a GPU
    has it, else fp32. `save_steps` 0: no checkpoint to resume from.
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
        check(self, "optim", OPTIM)
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
        check(self, "lora", LORA)


@dataclass(frozen=True, kw_only=True)
class ArchitectureParams:
    """Shape of a Llama pretrained from scratch as v0: by default the embedded world's.

    `kv_heads` 0: as many as heads. `max_positions` 0: the tokenizer's maximum, for `scratch` the block length.
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
    """v0: pretrained by `world` or `scratch`, on the world's words or on `vocab_size` byte-pair tokens of the corpus.

    Any other source is a directory or hub-id[@revision].
    """

    source: str = "world"
    vocab_size: int = 4096
    seed: int = 1234
    block_length: int = 64
    architecture: ArchitectureParams = field(default_factory=ArchitectureParams)
    optim: OptimParams = field(default_factory=OptimParams)


@dataclass(frozen=True, kw_only=True)
class ReleaseParams:
    """The recipe of a release: `base`, trained on the release's corpus, or `source`, a real release."""

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
        """Return the recipe of `release`; None for no name. Raises ParamsError for a name without a recipe."""
        if release is not None and release not in self.releases:
            hint = hint_of(release, self.releases, "evolve.releases") if self.releases else "; pass --params FILE"
            raise ParamsError(f"evolve.releases has no {release}{hint}")
        return None if release is None else self.releases[release]


@dataclass(frozen=True, kw_only=True)
class TaskOverrides:
    """The values of one task that replace those of its section."""

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
        """Return the section with the overrides of `task`. Raises ParamsError."""
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
    """The formula of a port: θ' + scale · Δ."""

    as_: Literal["merged", "adapter"] = "merged"
    method: Literal["direct"] = "direct"
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    """LM Evaluation Harness settings; `limit` 0: every row; `threads` 0: torch's default.

    `num_fewshot` -1: the number in the task's own definition; `batch_size` 0: chosen automatically.
    """

    seed: int = 1234
    num_fewshot: int = 0
    batch_size: int = 64
    limit: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        check(self, "evaluate", EVALUATE)


@dataclass(frozen=True, kw_only=True)
class ReportParams:
    """The report's threshold for a base's knowledge of a task, and its resampling."""

    probe_threshold: float = 0.9
    bootstrap_samples: int = 2000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RegisterParams:
    """Registry names with {task} and perhaps {release}: the last model of a name gets the alias.

    A ported arm must be above its base arm by more than `margin` (0..1).
    """

    name: str = "portllm-{task}"
    alias: str = "champion"
    margin: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Params:
    """All of params.yaml."""

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
    """Read the parameters in `path`; for None, the paper's defaults. Raises ParamsError."""
    if path is None:
        return Params()
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read ({error.strerror}); pass --params FILE") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ParamsError(f"{path}: not valid YAML ({text}); correct the file") from error
    return parse(Params, tree if tree is not None else {}, where="", source=str(path))
