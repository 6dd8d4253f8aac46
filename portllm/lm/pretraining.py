"""A release's making: pretraining from scratch, or continued pretraining of the release before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import DataError
from portllm.lm import probe, training
from portllm.lm.packing import pack, read_texts
from portllm.lm.quiet import quieten
from portllm.params import EvolveParams, FetchParams, OptimParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnMetrics = Callable[[int, Mapping[str, float]], None]
OnProgress = Callable[[int, int], None]

TRAIN = "train.parquet"
PROBE = "probe.parquet"


@dataclass(frozen=True)
class Release:
    """A model just made, in memory: saved as a checkpoint, asked what it knows."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metrics: Mapping[str, float]

    def save(self, folder: Path) -> None:
        """Write it as a Hugging Face checkpoint: config, safetensors, tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def known(self, corpus: Path) -> dict[str, float]:
        """The base probe per task: share (0..1) of the prompts in `corpus` the model continues rightly."""
        path = corpus / PROBE
        rows = read_rows(path, ("task", "prompt", "answer")) if path.is_file() else []
        tasks = dict.fromkeys(row["task"] for row in rows)
        pairs = {task: [(r["prompt"], r["answer"]) for r in rows if r["task"] == task] for task in tasks}
        return {task: probe.known(self.model, self.tokenizer, asked) for task, asked in pairs.items()}


def own_tokenizer(corpus: Path, params: FetchParams) -> PreTrainedTokenizerBase:
    """A byte-pair tokenizer learnt from the texts of `corpus`. Raises DataError and ParamsError."""
    from portllm.lm.words import byte_pairs

    longest = params.architecture.max_positions or params.block_length
    return byte_pairs(read_texts(corpus / TRAIN), params.vocab_size, longest)


def from_scratch(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path,
    params: FetchParams,
    *,
    on_metrics: OnMetrics | None = None,
    on_progress: OnProgress | None = None,
) -> Release:
    """A small Llama pretrained on the texts of `corpus`. Raises DataError."""
    from portllm.lm.llama import new_llama

    quieten()
    model = new_llama(tokenizer, params.architecture, params.seed)
    told = reporter(params.optim, on_metrics, on_progress)
    return _fit(model, tokenizer, corpus, params.block_length, params.optim, params.seed, told)


def continued(
    base: Path,
    corpus: Path,
    params: EvolveParams,
    *,
    on_metrics: OnMetrics | None = None,
    on_progress: OnProgress | None = None,
) -> Release:
    """`base` pretrained further on the texts of `corpus`: all weights, or a LoRA that is merged. Raises DataError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quieten()
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    told = reporter(params.optim, on_metrics, on_progress)
    if params.mode == "full":
        return _fit(model, tokenizer, corpus, params.block_length, params.optim, params.seed, told)
    patched = training.add_lora(model, params.lora, params.seed)
    trained = _fit(patched, tokenizer, corpus, params.block_length, params.optim, params.seed, told)
    return Release(training.merge_lora(patched), tokenizer, trained.metrics)


def reporter(optim: OptimParams, on_metrics: OnMetrics | None, on_progress: OnProgress | None) -> OnMetrics:
    """One call for both who want to know: the metrics of a step, and how far the training has come."""

    def report(step: int, values: Mapping[str, float]) -> None:
        if on_metrics:
            on_metrics(step, values)
        if on_progress and optim.max_steps:
            on_progress(step, optim.max_steps)

    return report


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a parquet file. Raises DataError when it cannot be read or lacks one of `columns`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); make it with `portllm prepare`") from error
    if missing := [c for c in columns if c not in table.column_names]:
        found = ", ".join(table.column_names)
        raise DataError(f"{path}: lacks the column {missing[0]}; expected {', '.join(columns)}, found {found}")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path,
    block_length: int,
    optim: OptimParams,
    seed: int,
    told: OnMetrics,
) -> Release:
    blocks = pack(tokenizer, read_texts(corpus / TRAIN), block_length)
    fitted = training.fit(model, tokenizer, blocks, optim=optim, seed=seed, on_metrics=told)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    metrics = {
        **training.last_loss(fitted.history),
        "documents": blocks.documents,
        "blocks": len(blocks),
        "tokens_dropped": blocks.dropped,
        "trainable_parameters": trainable,
    }
    return Release(model, tokenizer, metrics)
