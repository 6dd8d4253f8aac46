"""What scoring gives: the harness's own metrics of a task, the answer to every document, and the files they go to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portllm.errors import EvaluationError

NOT_METRICS = ("alias", "name", "sample_len", "sample_count")
# what a task is judged by, in this order; any other metric comes after these
JUDGES = ("acc", "exact_match", "word_perplexity", "perplexity", "em", "acc_norm", "mcc", "f1")
# metrics of a document that are (right label, answered label), to be counted over all documents
COUNTED = ("f1", "mcc")

# of a result in the file of results
ROW = ("task", "patch", "arm", "patch_task", "patch_fingerprint", "metrics", "samples")


@dataclass(frozen=True, kw_only=True)
class ScoredDocument:
    """One scored document: `score` is the task's main metric on it (1.0 right, 0.0 wrong).

    `metrics` and `answers` hold every filter's; `loglikelihoods` (nats) one value per choice, none for written answers;
    `written` is the answer before any filter, where it was written.
    """

    doc_id: int
    score: float
    answer: str
    target: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    loglikelihoods: tuple[float, ...] = ()
    written: str = ""


@dataclass(frozen=True, kw_only=True)
class ScoredTask:
    """One task scored on one model: the harness's own metric keys, and the answers to the documents of `split`.

    `truncated` counts the documents whose prompt is longer than the model's context, and so lost its beginning.
    """

    task: str
    split: str
    metrics: Mapping[str, float]
    documents: tuple[ScoredDocument, ...]
    truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class ArmScore:
    """A task's score on one arm; `patch` is the unique name of what is scored, None for the bare model."""

    task: str
    patch: str | None
    arm: str
    patch_task: str | None
    patch_fingerprint: str | None
    metrics: Mapping[str, float]
    documents: tuple[ScoredDocument, ...]
    truncated: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the row of the results file; `truncated` is in it only where a prompt was truncated."""
        row = {**{name: getattr(self, name) for name in ROW[:-1]}, "samples": len(self.documents)}
        return {**row, "truncated": self.truncated} if self.truncated else row


def of_results(name: str, results: Mapping[str, Any], *, split: str, truncated: int = 0) -> ScoredTask:
    """Return what the harness's `evaluate` says of the task `name`. Raises EvaluationError when it has no metric."""
    metrics = {k: float(v) for k, v in results["results"][name].items() if _is_metric(k, v)}
    label, _, strainer = main_metric(metrics).partition(",")
    by_document: dict[int, dict[str, Mapping[str, Any]]] = {}
    for sample in sorted(results["samples"][name], key=lambda s: int(s["doc_id"])):
        by_document.setdefault(int(sample["doc_id"]), {})[sample["filter"]] = sample
    documents = tuple(_document(number, samples, label, strainer) for number, samples in by_document.items())
    return ScoredTask(task=name, split=split, metrics=metrics, documents=documents, truncated=truncated)


def main_metric(metrics: Mapping[str, float]) -> str:
    """Return the key a task is judged by: accuracy, exact match or perplexity first. Raises EvaluationError."""
    for judge in JUDGES:
        for key in sorted(metrics, reverse=True):
            if key.startswith(f"{judge},"):
                return key
    if not metrics:
        raise EvaluationError("the task gives no metric that is a number; nothing can be compared by it")
    return next(iter(metrics))


def expect_rows(rows: Any, file: Path) -> None:
    """Raise EvaluationError unless `rows` are what `file` should hold: results, each with metrics that are numbers."""
    if not isinstance(rows, list):
        raise EvaluationError(f"{file}: expected a list of results, found {rows!r:.60}; run portllm evaluate again")
    for number, row in enumerate(rows):
        tree = row if isinstance(row, dict) else {}
        metrics = tree.get("metrics")
        if missing := [name for name in ROW if name not in tree]:
            problem = f"has no {missing[0]}"
        elif not isinstance(metrics, dict) or not metrics:
            problem = f"has no metrics, but {metrics!r:.60}"
        elif wrong := [name for name, value in metrics.items() if not _is_metric(name, value)]:
            problem = f"has {metrics[wrong[0]]!r:.60} as {wrong[0]}, expected a finite number"
        else:
            continue
        raise EvaluationError(f"{file}: result {number} ({tree.get('task')}) {problem}; run portllm evaluate again")


def write_samples(path: Path, scores: Sequence[ArmScore]) -> None:
    """Write a Parquet row per document and score; the maps hold every filter's metrics and answers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    columns = {"task": text, "arm": text, "patch_task": text, "patch": text, "patch_fingerprint": text}
    columns |= {"doc_id": pa.int64(), "correct": pa.bool_(), "score": number, "answer": text, "target": text}
    columns |= {"metrics": pa.map_(text, number), "answers": pa.map_(text, text)}
    schema = pa.schema(columns | {"loglikelihoods": pa.list_(number), "written": text})
    arm_columns = ("task", "arm", "patch_task", "patch", "patch_fingerprint")
    rows = [
        {**{name: getattr(score, name) for name in arm_columns}, **_sample(document)}
        for score in scores
        for document in score.documents
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")


def _sample(document: ScoredDocument) -> dict[str, Any]:
    maps = {name: list(getattr(document, name).items()) for name in ("metrics", "answers")}
    return {**vars(document), **maps, "correct": document.score == 1.0}


def _document(number: int, samples: Mapping[str, Mapping[str, Any]], label: str, strainer: str) -> ScoredDocument:
    """One document from the harness's samples of it, by filter; `label` and `strainer` name the main metric."""
    main = samples[strainer]
    metrics = {f"{key},{name}": _number(key, s[key]) for name, s in samples.items() for key in s["metrics"] if key in s}
    return ScoredDocument(
        doc_id=number,
        score=metrics[f"{label},{strainer}"],
        answer=_answer(main),
        target=str(main["target"]),
        metrics=metrics,
        answers={name: _answer(sample) for name, sample in samples.items()},
        loglikelihoods=_loglikelihoods(main["resps"]),
        written=_written(main["resps"]),
    )


def _answer(sample: Mapping[str, Any]) -> str:
    """Return the text the model generated, or the index of the choice it finds likeliest."""
    answers = sample["filtered_resps"]
    if isinstance(answers[0], str):
        return answers[0]
    if "acc_mutual_info" in sample["metrics"]:
        answers = answers[: len(answers) // 2]  # the others are the choices without their context
    if isinstance(answers[0], (list, tuple)) and len(answers) > 1:
        return str(max(range(len(answers)), key=lambda i: answers[i][0]))
    return ""


def _loglikelihoods(answers: Sequence[Sequence[Any]]) -> tuple[float, ...]:
    """Return the log-likelihood in the first answer to each request."""
    values = [one[0][0] if isinstance(one[0], (list, tuple)) else one[0] for one in answers if one]
    return tuple(float(value) for value in values) if all(isinstance(v, float) for v in values) else ()


def _written(answers: Sequence[Sequence[Any]]) -> str:
    """Return the first answer to the first request, where it is text."""
    first = answers[0][0] if answers and answers[0] else None
    return first if isinstance(first, str) else ""


def _is_metric(key: str, value: Any) -> bool:
    return key not in NOT_METRICS and isinstance(value, (int, float)) and math.isfinite(value)


def _number(metric: str, value: Any) -> float:
    """Return a document's metric as a number; not a number where it is none."""
    if isinstance(value, (list, tuple)):
        if metric in COUNTED:
            return float(value[0] == value[1])
        # rolling log-likelihoods come as (log-likelihood, words); their mean is not taken per document
        value = value[0] if value else math.nan
    return float(value) if isinstance(value, (int, float)) else math.nan
