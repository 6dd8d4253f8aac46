"""transformers' Trainer, taught three things: batches of the whole job, snapshots that are whole, and silence."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm import processes
from portllm.lm.learning import resuming

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from portllm.lm.learning.batches import GlobalBatches
    from portllm.lm.learning.snapshots import Snapshots

OnMetrics = Callable[[int, Mapping[str, float]], None]
OnProgress = Callable[[int, int], None]
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Plan:
    """What one training follows beside Trainer's own arguments."""

    batches: GlobalBatches
    snapshots: Snapshots | None
    resumed: resuming.Resumed | None
    on_metrics: OnMetrics | None
    on_progress: OnProgress | None

    def checkpoint(self, scratch: Path) -> str | None:
        """The directory Trainer resumes from: it holds Trainer's counters alone, the rest comes from the snapshot."""
        if not self.resumed:
            return None
        folder = scratch / f"checkpoint-{self.resumed.step}"
        folder.mkdir()
        (folder / TRAINER_STATE).write_text(json.dumps(self.resumed.trainer_state), encoding="utf-8")
        return str(folder)


def row(entry: Mapping[str, Any]) -> dict[str, float]:
    """One line of the history, from what Trainer logs."""
    return {"step": int(entry["step"]), "loss": float(entry["loss"]), "learning_rate": float(entry["learning_rate"])}


class _Planned:
    """What is changed of Trainer, whose own checkpoints are pickles and lose the loss summed between two log lines."""

    plan: Plan

    def get_train_dataloader(self: Any) -> DataLoader[Any]:
        from torch.utils.data import DataLoader

        # not prepared by accelerate, which would hand out batches again and fill up an epoch's last one
        return DataLoader(self.train_dataset, batch_sampler=self.plan.batches, collate_fn=self.data_collator)

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:  # noqa: ARG002
        # after the last step there is nothing to resume
        if self.plan.snapshots is None or self.state.global_step >= self.state.max_steps:
            return
        snapshot = resuming.capture(self)
        if processes.is_main():
            self.plan.snapshots.write(snapshot)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        self.plan.resumed.give_weights(self.model if model is None else model)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.plan.resumed.give_optimizer(self)

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.plan.resumed.give_random(self.args.device)


class _Listening:
    """Tells the plan's listeners each logged row and each step, those before a resumption included."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        plan: Plan = self._trainer.plan
        if plan.resumed:
            plan.resumed.give_loss(self._trainer)
            for entry in state.log_history:
                self._tell(entry)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        self._tell({**(logs or {}), "step": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self._trainer.plan.on_progress:
            self._trainer.plan.on_progress(state.global_step, state.max_steps)

    def _tell(self, entry: Mapping[str, Any]) -> None:
        if self._trainer.plan.on_metrics and "loss" in entry:
            told = row(entry)
            self._trainer.plan.on_metrics(int(told.pop("step")), told)


@functools.cache
def _classes() -> tuple[type[Any], type[Any]]:
    """Both as subclasses of transformers' own, which is loaded here."""
    from transformers import Trainer, TrainerCallback

    return type("PlannedTrainer", (_Planned, Trainer), {}), type("Listener", (_Listening, TrainerCallback), {})


def planned_trainer(plan: Plan, **settings: Any) -> Any:
    """A Trainer with `settings` that follows `plan` and says nothing of its own."""
    from transformers import PrinterCallback

    trainer_class, listener_class = _classes()
    trainer = trainer_class(**settings)
    trainer.plan = plan
    trainer.add_callback(listener_class(trainer))
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to --json
    return trainer
