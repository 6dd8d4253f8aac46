"""tasks: the names a patch can be trained on and a model evaluated on."""

from __future__ import annotations

from portllm.world import datasets


def run(*, everything: bool = False) -> list[str]:
    """The embedded world's tasks; with `everything`, the LM Evaluation Harness's own after them."""
    if not everything:
        return list(datasets.TASKS)
    from lm_eval.tasks import TaskManager

    return [*datasets.TASKS, *TaskManager().all_subtasks]
