"""train: a LoRA patch of a base on a task, with the prompts the task is evaluated with."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from portllm.checkpoint.card import patch_card
from portllm.checkpoint.fingerprint import fingerprint
from portllm.checkpoint.output import staged
from portllm.checkpoint.provenance import digests, git_commit, public_name, revision, versions
from portllm.checkpoint.records import PatchRecord, Source
from portllm.lm import patching, pretraining, prompts
from portllm.params import TrainParams, as_tree
from portllm.world import datasets

HISTORY = "history.csv"


def run(
    *,
    base: Path,
    task: str,
    data: Path,
    out: Path,
    params: TrainParams,
    force: bool = False,
    on_metrics: pretraining.OnMetrics | None = None,
    on_progress: pretraining.OnProgress | None = None,
) -> PatchRecord:
    """Train a patch of `base` on DATA/<task>/train.parquet and write it to `out`.

    The directory is PEFT's own, with patch.json, a model card and the training curve.
    Raises DataError, CheckpointError, EvaluationError and OutputError.
    """
    template = prompts.Prompts.load(datasets.task_file(task))
    file = data / task / pretraining.TRAIN
    with staged(out, force=force, inputs=(base, data)) as folder:
        pairs = template.pairs(pretraining.read_rows(file, ()))
        told = pretraining.reporter(params.optim, on_metrics, on_progress)
        made = patching.train(base, pairs, params, on_metrics=told)
        made.save(folder, base_name=public_name(base))
        _write_history(folder / HISTORY, made.history)
        record = PatchRecord(
            task=task,
            base=Source(name=public_name(base), fingerprint=fingerprint(base), revision=revision(base)),
            fingerprint=fingerprint(folder),
            data=digests([file]),
            params={k: v for k, v in as_tree(params).items() if k != "per_task"},
            metrics=made.metrics,
            versions=versions("torch", "transformers", "peft"),
            git_commit=git_commit(),
        )
        (folder / "README.md").write_text(patch_card(record), encoding="utf-8")
        record.write(folder)
    return record


def _write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    columns = ("step", "loss", "learning_rate")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
