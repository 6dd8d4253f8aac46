"""train: a LoRA patch of a base on a task, with the prompts of the task's evaluation."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.files.output import kept, staged
from portllm.checkpoint.record.card import patch_card
from portllm.checkpoint.record.provenance import public_name, revision, versions
from portllm.checkpoint.record.records import PatchRecord, Source
from portllm.lm.data import tasks
from portllm.lm.learning import batches, loading, patching, training
from portllm.lm.learning.snapshots import training_key
from portllm.params import TrainParams, as_tree

HISTORY = "history.csv"


def run(
    *,
    base: Path,
    task: str,
    data: Path | None = None,
    out: Path,
    params: TrainParams,
    force: bool = False,
    on_metrics: training.OnMetrics | None = None,
    on_progress: training.OnProgress | None = None,
    on_cost: Callable[[Mapping[str, float]], object] = lambda _: None,
    on_note: Callable[[str], object] = lambda _: None,
) -> PatchRecord:
    """Train a patch of `base` on DATA/<task>'s training split and write it to `out`.

    Without `data`, DATA is the first of data/tasks and data that has the task.

    The directory is PEFT's own, with patch.json, a model card and the training curve. With optim.save_steps the next
    run of the same inputs and parameters resumes a killed one. `on_cost` gets the figures of what training cost.
    Raises DataError, CheckpointError, EvaluationError, ParamsError, MachineError and OutputError.
    """
    batches.rows_per_process(params.optim)  # before anything is read
    data = tasks.training_folder(task, data)
    digests = tasks.digests(task, data, "training")
    key = _key(base, task, digests, params) if params.optim.save_steps else None
    with staged(out, force=force, inputs=(base, data), key=key) as folder:
        pairs = tasks.training_pairs(task, data, loading.tokenizer_of(base))
        patch = patching.train(
            base, pairs, params, on_metrics=on_metrics, on_progress=on_progress, on_note=on_note,
            checkpoints=kept(out, key) if key else None,
        )  # fmt: skip
        on_cost(patch.cost)
        patch.save(folder, base_name=public_name(base))
        _write_history(folder / HISTORY, patch.history)
        record = PatchRecord(
            task=task,
            base=Source(
                name=public_name(base),
                fingerprint=fingerprint(base),
                revision=revision(base),
                quantisation=loading.NF4 if params.quantization == loading.FOUR_BITS else None,
            ),
            fingerprint=fingerprint(folder),
            data=digests,
            params={k: v for k, v in as_tree(params).items() if k != "per_task"},
            metrics=patch.metrics,
            versions=versions("torch", "transformers", "peft"),
        )
        (folder / "README.md").write_text(patch_card(record), encoding="utf-8")
        record.write(folder)
    return record


def _key(base: Path, task: str, digests: Mapping[str, str], params: TrainParams) -> str:
    return training_key(base, task, dict(digests), as_tree(params))


def _write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    columns = ("step", "loss", "learning_rate")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
