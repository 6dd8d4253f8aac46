"""Published figures of other authors, each with source and setting, for an experiment that follows their protocol.

Scores are shares. A figure is shown for its task and model (or the model it may be of: its setting says which), where
params.yaml keeps the paper's protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from portllm.params import ALL_LINEARS, Params

PORTLLM = "PortLLM (arXiv:2410.10870)"
FOLLOW_UP = "follow-up (arXiv:2607.20301)"
MISTRAL = "Mistral-7B-v0.1"


@dataclass(frozen=True, kw_only=True)
class PublishedScores:
    """Three arms of one task on an updated release, shown next to our `model`; `setting` describes theirs."""

    source: str
    setting: str
    model: str
    task: str
    base: float
    ported: float
    retuned: float


@dataclass(frozen=True, kw_only=True)
class PublishedCost:
    """What a patch costs on one task and model: by LoRA training, and by porting. Memory is summed over the GPUs."""

    source: str
    model: str
    task: str
    trained_parameters: int
    trained_memory_gigabytes: float
    trained_gpu_hours: float
    ported_memory_gigabytes: float
    ported_gpu_hours: float


@dataclass(frozen=True, kw_only=True)
class PublishedFigures:
    """The published figures that fit an experiment; `differences` lists where the experiment leaves their protocol."""

    scores: tuple[PublishedScores, ...] = ()
    cost: PublishedCost | None = None
    differences: tuple[str, ...] = ()


def _later(task: str, base: float, ported: float, retuned: float) -> PublishedScores:
    setting = "a Mistral (which one is not known to us), after LoRA updates, ten in a row, three seeds"
    return PublishedScores(
        source=FOLLOW_UP, setting=setting, model=MISTRAL, task=task, base=base, ported=ported, retuned=retuned
    )


SCORES = (
    PublishedScores(
        source=PORTLLM,
        setting="one of the paper's four models (which one is not known to us), zero-shot, after one update",
        model=MISTRAL,
        task="gsm8k",
        base=0.1516,
        ported=0.4132,
        retuned=0.3495,
    ),
    _later("winogrande", 0.741, 0.855, 0.846),
    _later("boolq", 0.832, 0.901, 0.902),
    _later("gsm8k", 0.168, 0.703, 0.699),
)
COST = PublishedCost(
    source=PORTLLM,
    model=MISTRAL,
    task="sst2",
    trained_parameters=20_971_520,
    trained_memory_gigabytes=350.61,
    trained_gpu_hours=40.65,
    ported_memory_gigabytes=28.71,
    ported_gpu_hours=0.0083,
)


def published_figures(params: Params) -> PublishedFigures:
    """Return what is published about the experiment that `params` describes."""
    model = params.fetch.source.partition("@")[0].rstrip("/").rpartition("/")[2]
    scores = tuple(one for one in SCORES if one.model == model and one.task in params.tasks)
    cost = COST if model == COST.model and COST.task in params.tasks else None
    if not scores and cost is None:
        return PublishedFigures()
    differences = tuple(_differences(params))
    return PublishedFigures(differences=differences) if differences else PublishedFigures(scores=scores, cost=cost)


def _differences(params: Params) -> Iterator[str]:
    """Yield where the experiment leaves the paper's protocol."""
    train, optim, lora = params.train, params.train.optim, params.train.lora
    pairs: tuple[tuple[str, object, object], ...] = (
        ("train.lora.r", lora.r, 8),
        ("train.lora.alpha", lora.alpha, 16),
        ("train.lora.dropout", lora.dropout, 0.1),
        ("train.lora.use_rslora", lora.use_rslora, False),
        ("train.lora.target_modules", sorted(lora.target_modules), sorted(ALL_LINEARS)),
        ("train.optim.learning_rate", optim.learning_rate, 1e-4),
        ("train.optim.epochs", optim.epochs, 10.0),
        ("train.optim.max_steps", optim.max_steps, 0),
        ("rows per step", optim.batch_size * optim.gradient_accumulation, 4),
        ("train.quantization", train.quantization, "none"),
        ("train.max_length", train.max_length, 256),
        ("port.scale", params.port.scale, 1.0),
        ("evaluate.num_fewshot", params.evaluate.num_fewshot, 0),
        ("evaluate.limit", params.evaluate.limit, 0),
        ("prepare.limit", params.prepare.limit, 0),
    )
    for name, ours, theirs in pairs:
        if ours != theirs:
            yield f"{name} is {ours}, theirs {theirs}"
    if overridden := sorted(set(train.per_task) & set(params.tasks)):
        yield f"train.per_task changes {', '.join(overridden)}"
    recipes = params.evolve.releases.values()
    if params.evolve.mode != "lora" and any(recipe.source is None for recipe in recipes):
        yield f"evolve.mode is {params.evolve.mode}, theirs lora"
    if any(recipe.source for recipe in recipes):
        yield "the releases are real ones, theirs are made by continued pretraining"
