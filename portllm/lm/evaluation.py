"""The LM Evaluation Harness over one loaded base and many patches.

The harness is driven through its own classes, so prompts, filters and metrics are the official ones.
Tasks are built once and scored again for every patch; adapters are switched on the one loaded base,
which gives bit-identical results to loading each on its own.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import EvaluationError
from portllm.lm.quiet import quieten
from portllm.params import EvaluateParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One scored document: `score` is the task's main metric on it (1.0 right, 0.0 wrong)."""

    doc_id: int
    score: float
    answer: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One task scored on one model: the harness's own metric keys, and every document's answer."""

    task: str
    metrics: Mapping[str, float]
    samples: tuple[Sample, ...]


class Harness:
    """A loaded model, its tokenizer and the tasks it is asked; `score` may be called many times."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, Any],
        params: EvaluateParams,
    ) -> None:
        import torch
        from lm_eval.models.huggingface import HFLM

        quieten()
        if params.threads:
            torch.set_num_threads(params.threads)
        self._tasks = tasks
        self._params = params
        self._model = model
        self._lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=params.batch_size)
        if os.environ.get("TQDM_DISABLE"):
            _without_bars(self._lm)

    def score(self, names: Sequence[str], *, model: Any = None) -> list[Scored]:
        """The named tasks, scored on `model` (default: the model the harness was made with)."""
        from lm_eval.evaluator import evaluate

        self._lm._model = self._model if model is None else model
        results = evaluate(
            self._lm,
            {"tasks": {name: self._tasks[name] for name in names}},
            limit=self._params.limit or None,
            bootstrap_iters=0,
            log_samples=True,
        )
        return [_scored(name, results) for name in names]


def load_tasks(specs: Sequence[str | Mapping[str, Any]], params: EvaluateParams) -> dict[str, Any]:
    """Harness task objects by name, from the harness's own names or whole task configurations.

    Raises EvaluationError when a name is unknown or its data cannot be had.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    quieten()
    datasets.disable_progress_bars()
    stock = any(isinstance(spec, str) for spec in specs)
    manager = TaskManager(include_defaults=stock)
    loaded: dict[str, Any] = {}
    for spec in specs:
        name = spec if isinstance(spec, str) else str(spec["task"])
        try:
            loaded.update(manager.load([spec if isinstance(spec, str) else dict(spec)])["tasks"])
        except KeyError as error:
            if not isinstance(spec, str):
                raise EvaluationError(f"{name}: its task file and its data do not fit: no {error}") from error
            raise EvaluationError(
                f"{name}: no such task in the LM Evaluation Harness nor in the embedded world; see `portllm tasks`"
            ) from error
        except (ConnectionError, FileNotFoundError, OSError, ValueError) as error:
            raise EvaluationError(f"{name}: its data cannot be loaded ({_first_line(error)})") from error
    for task in loaded.values():
        if params.num_fewshot or task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=params.num_fewshot)
        task.set_fewshot_seed(seed=params.seed)
    return loaded


def on_files(config: Mapping[str, Any], files: Mapping[str, Path], *, name: str) -> dict[str, Any]:
    """A task file's configuration, named `name` and reading the parquet file of each split.

    Raises EvaluationError when a file is not there.
    """
    for path in files.values():
        if not path.is_file():
            raise EvaluationError(f"{name}: {path} is not there; make it with `portllm prepare`, or pass --data DIR")
    sources = {split: str(path.resolve()) for split, path in files.items()}
    return {**config, "task": name, "dataset_path": "parquet", "dataset_kwargs": {"data_files": sources}}


def load_model(path: Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and tokenizer in `path`, on the GPU where there is one, in eval mode.

    Raises EvaluationError when either cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: transformers cannot load it ({_first_line(error)})") from error
    return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def adapted(base: Any, patch: Path) -> Iterator[Any]:
    """`base` with the PEFT adapter in `patch` switched on, unmerged; taken off again afterwards."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, str(patch), is_trainable=False).eval()
    try:
        yield model
    finally:
        model.unload()


def main_metric(metrics: Mapping[str, float]) -> str:
    """The key a task is judged by: accuracy, exact match or perplexity, in that order. Raises EvaluationError."""
    for prefix in ("acc,", "exact_match,", "word_perplexity,", "perplexity,"):
        for key in sorted(metrics, reverse=True):
            if key.startswith(prefix):
                return key
    raise EvaluationError(f"no accuracy, exact match or perplexity among {', '.join(sorted(metrics)) or 'no metrics'}")


def _without_bars(lm: Any) -> None:
    # the harness tells tqdm outright to show its bars, so that the environment's TQDM_DISABLE is not heard
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, name, functools.partial(getattr(lm, name), disable_tqdm=True))


def _scored(name: str, results: Mapping[str, Any]) -> Scored:
    metrics = {k: float(v) for k, v in results["results"][name].items() if _is_metric(k, v)}
    logged = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    main = main_metric(metrics)
    label, _, strainer = main.partition(",")
    rows = [s for s in logged if s["filter"] == strainer]
    samples = tuple(
        Sample(doc_id=s["doc_id"], score=_number(s[label]), answer=_answer(s), target=str(s["target"])) for s in rows
    )
    return Scored(task=name, metrics=metrics, samples=samples)


def _answer(sample: Mapping[str, Any]) -> str:
    """What the model said: the text it generated, or the index of the choice it found likeliest."""
    answers = sample["filtered_resps"]
    if isinstance(answers[0], str):
        return answers[0]
    if isinstance(answers[0], (list, tuple)) and len(answers) > 1:
        return str(max(range(len(answers)), key=lambda i: answers[i][0]))
    return ""


def _is_metric(key: str, value: Any) -> bool:
    return key not in NOT_METRICS and isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: Any) -> float:
    # rolling log-likelihoods come as (log-likelihood, words); their mean is not taken per document
    return float(value[0]) if isinstance(value, (list, tuple)) else float(value)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
