"""tasks: the names of tasks to train a patch and evaluate a model on."""

from __future__ import annotations

from collections.abc import Sequence

from portllm.lm.data import columns, prompts, stock
from portllm.lm.data.stock import Listed
from portllm.world import datasets


def run(*, everything: bool = False) -> Sequence[Listed]:
    """Return the embedded world's tasks and the paper's seven; with `everything`, all of the harness's."""
    world = [_listed(task) for task in datasets.TASKS]
    if everything:
        return [*world, *stock.listing()]
    return [*world, *(_seven(task) for task in columns.SEVEN)]


def _listed(task: str) -> Listed:
    config = prompts.load_task(datasets.task_file(task))
    return Listed(task=task, output_type=config["output_type"], trainable=bool(config.get("training_split")))


def _seven(task: str) -> Listed:
    # constant, so that no file of the harness is read
    return Listed(task=task, output_type="generate_until" if task == "gsm8k" else "multiple_choice", trainable=True)
