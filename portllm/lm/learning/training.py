"""The training loop: pretraining on packed text and LoRA on answers, on one process or many, stopped and resumed.

Guaranteed:
- Every step reads the same rows for any number of processes, and each token of a step counts alike, whatever the
  padding, the accumulation and the number of processes. So the machine changes a result by rounding at most.
- On the same kind of machine, with the same threads and processes, the weights are byte-identical from run to run, also
  where a run was killed and resumed: a snapshot holds all that changes, as safetensors, and its checksum is verified.
- A gradient, loss or weight that is not finite ends the training on every process, and nothing of it is saved.

The loop is ours, on accelerate, because transformers' Trainer has no public way to these: its checkpoints are pickles
and lack the loss summed since the last log line, and its loader fills up the last batch of an epoch for many processes.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm import processes
from portllm.errors import CheckpointError, ParamsError
from portllm.lm import opening
from portllm.lm.data.encoding import IGNORED, Example
from portllm.lm.learning import batches, machine, snapshots
from portllm.lm.learning.batches import Batch, Collator, TokenCounts
from portllm.lm.learning.loading import computes_in
from portllm.lm.learning.snapshots import Snapshots, TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from torch import Tensor
    from torch.optim import AdamW
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from portllm.params import OptimParams

OnMetrics = Callable[[int, Mapping[str, float]], object]
OnProgress = Callable[[int, int], object]
OnNote = Callable[[str], object]


def _ignore(*_: object) -> None:
    """Do nothing: the callback of those who pass none."""


@dataclass(frozen=True)
class Fitted:
    """The result of a training: the history (step, loss, learning_rate), its cost, and the trained weights.

    `weights` is None where the model itself holds them; where it is sharded over processes, they are gathered here, on
    the CPU.
    """

    history: list[dict[str, float]]
    cost: Mapping[str, float]
    weights: Mapping[str, Tensor] | None = None

    @property
    def loss(self) -> float:
        """The loss of the last row."""
        return self.history[-1]["loss"]


def fit(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    optim: OptimParams,
    seed: int,
    on_metrics: OnMetrics | None = None,
    on_progress: OnProgress | None = None,
    checkpoints: Path | None = None,
    on_note: OnNote = _ignore,
) -> Fitted:
    """Train `model` in place, from the last snapshot in `checkpoints` on, if there is one.

    The history has a row every optim.logging_steps steps and one for the last step: the mean loss since the row before.
    `on_metrics(step, metrics)` gets each row, those before a resumption included; `on_progress(step, steps)` each step.
    Raises ParamsError, also where a gradient, loss or weight is not finite, CheckpointError and MachineError.
    """
    padding = _padding(model, tokenizer, examples)
    if optim.gradient_checkpointing:
        _recompute(model)
    counts, meter = TokenCounts(), machine.CostMeter()
    with machine.fixed_threads(optim.threads), machine.refusals():
        loop = _prepared(model, optim, seed, len(examples))
        files = Snapshots(checkpoints, on_note) if checkpoints and optim.save_steps else None
        restore_random = snapshots.restore(loop.state, files) if files else None
        if restore_random:
            on_note(f"going on after step {loop.state.step}, where an earlier run was stopped")
        loader = batches.loader(examples, Collator(padding, counts), optim, seed)
        with meter.running():
            updates = batches.updates(loader, loop.state.step, optim, restore_random)
            loop.run(updates, on_metrics, on_progress, files)
        weights = _gathered(model)
        loop.check_weights(weights or dict(snapshots.trained(model)))
        fitted = Fitted(loop.state.history, meter.figures(counts.computed, counts.useful), weights)
    model.eval()
    return fitted


@dataclass(frozen=True)
class _Loop:
    """A training under way on this process: `model` is wrapped for the processes, `state` is all that changes.

    `divides`: the model divides its summed loss by a number of targets.
    """

    accelerator: Accelerator
    model: Any
    state: TrainingState
    optim: OptimParams
    steps: int
    divides: bool

    def run(
        self,
        updates: Iterator[list[Batch]],
        on_metrics: OnMetrics | None,
        on_progress: OnProgress | None,
        files: Snapshots | None,
    ) -> None:
        """Make each step of `updates` that is left: update, report, log, write a snapshot."""
        state, optim, on_metrics, on_progress = self.state, self.optim, on_metrics or _ignore, on_progress or _ignore
        for row in state.history:
            _report(row, on_metrics)
        for update in itertools.islice(updates, self.steps - state.step):
            rate = float(state.schedule.get_last_lr()[0])
            self._update(update)
            on_progress(state.step, self.steps)
            is_last = state.step == self.steps
            if is_last or state.step % optim.logging_steps == 0:
                self._log(rate)
                _report(state.history[-1], on_metrics)
            if files and not is_last and state.step % optim.save_steps == 0:
                snapshot = snapshots.capture(state)
                if processes.is_main():
                    files.write(snapshot)

    def _update(self, update: Sequence[Batch]) -> None:
        """Make one step of its batches, this process's rows of them. Raises ParamsError on all processes alike."""
        state, accelerator = self.state, self.accelerator
        own = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in update)
        targets = accelerator.gather(state.loss_sum.new_tensor([own])).sum()
        for number, batch in enumerate(update, start=1):
            # the processes' gradients are summed once a step
            with contextlib.nullcontext() if number == len(update) else accelerator.no_sync(self.model):
                loss = self._loss({key: value.to(accelerator.device) for key, value in batch.items()}, targets)
                accelerator.backward(loss)
            state.loss_sum += loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.optim.max_grad_norm or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._check("gradient norm", float(norm), state.step + 1)
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad()
        state.step += 1

    def _loss(self, batch: Batch, targets: Tensor) -> Tensor:
        """Return the sum of the batch's losses by `targets`, the number of tokens with a loss in the step.

        DDP and FSDP divide gradients by the number of processes: the loss is multiplied by it.
        """
        import torch

        bf16 = computes_in(self.optim.precision) == "bf16"
        with torch.autocast(targets.device.type, torch.bfloat16, enabled=bf16):
            if self.divides:
                loss: Tensor = self.model(**batch, num_items_in_batch=targets).loss
            else:
                logits, labels = self.model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
                each = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                loss = each / targets
        return loss * processes.count()

    def _log(self, rate: float) -> None:
        """Add a row to the history: the mean loss since the row before. Raises ParamsError on all processes alike."""
        state = self.state
        loss = float(self.accelerator.gather(state.loss_sum).mean()) / (state.step - state.logged)
        self._check("loss", loss, state.step)
        state.loss_sum.zero_()
        state.logged = state.step
        state.history.append({"step": state.step, "loss": loss, "learning_rate": rate})

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Raise ParamsError for the first of the trained `weights` that is not finite."""
        for name, weight in weights.items():
            for value in weight.detach()[~weight.isfinite()][:1]:
                self._check(name, float(value), self.state.step)

    def _check(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        cure = f"lower optim.learning_rate (now {self.optim.learning_rate:g}) or raise optim.warmup_ratio"
        if self.state.step == 0:  # no weight has changed yet
            cure = "check the base's weights, or use optim.precision: fp32"
        raise ParamsError(
            f"training stopped at step {step} of {self.steps}: expected a finite {name}, found {value}; {cure}"
        )


def _prepared(model: Any, optim: OptimParams, seed: int, rows: int) -> _Loop:
    """Return the training of `model` before its first step."""
    from accelerate.utils import set_seed
    from transformers import get_scheduler

    steps, accelerator = batches.steps(optim, rows), machine.accelerator_for(optim)
    # seeded alike, the processes would drop the same places of different rows
    set_seed(seed + processes.index())
    model.config.use_cache = False  # keys and values of earlier tokens are for generation
    optimizer = _optimizer(model, optim)
    wrapped, _ = accelerator.prepare(model, optimizer)
    decays = optim.schedule == "warmup_stable_decay"
    schedule = get_scheduler(
        optim.schedule,
        optimizer,
        num_warmup_steps=math.ceil(steps * optim.warmup_ratio),
        num_training_steps=steps,
        scheduler_specific_kwargs={"num_decay_steps": round(steps * optim.decay_ratio)} if decays else {},
    )
    wrapped.train()
    state = TrainingState(model, optimizer, schedule, accelerator.device)
    return _Loop(accelerator, wrapped, state, optim, steps, _divides(model))


def _optimizer(model: Any, optim: OptimParams) -> AdamW:
    """Return AdamW (arXiv:1711.05101) of what is trained; vectors, which are norms and biases, do not decay."""
    from torch.optim import AdamW

    parameters = [parameter for _, parameter in snapshots.trained(model)]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=1e-8, fused=True)


def _divides(model: Any) -> bool:
    """Return whether `model` takes the number of targets to divide its loss by, as transformers' own models do."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    parameters = inspect.signature(inner.forward).parameters.values()
    takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return bool(getattr(inner, "accepts_loss_kwargs", takes_any))


def _padding(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> int:
    """Return the token to pad with. Raises CheckpointError where `examples` hold a token that `model` has no row for.

    Many bases have no token for padding, or no row for it: any other does, as it carries no loss and no token of the
    text attends to it.
    """
    rows = opening.known_tokens(model)
    if len(tokenizer) > rows:  # not wrong in itself: some tokens are for pictures, and never occur in text
        highest = max(max(example["input_ids"]) for example in examples)
        if highest >= rows:
            raise CheckpointError(opening.unknown(highest, rows))
    padding = tokenizer.pad_token_id or 0
    return padding if padding < rows else 0


def _recompute(model: PreTrainedModel | PeftModel) -> None:
    """Keep no activations between forward and backward but each layer's input: less memory, a fifth more time."""
    # renamed in transformers 5.2x
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()


def _gathered(model: PreTrainedModel | PeftModel) -> dict[str, Tensor] | None:
    """Return the trained weights where they are sharded over processes; every process has to call it."""
    parameters = dict(snapshots.trained(model))
    if not any(hasattr(parameter, "full_tensor") for parameter in parameters.values()):
        return None
    return {name: snapshots.gather(parameter) for name, parameter in parameters.items()}


def _report(row: Mapping[str, float], on_metrics: OnMetrics) -> None:
    on_metrics(int(row["step"]), {key: value for key, value in row.items() if key != "step"})
