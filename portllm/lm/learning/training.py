"""Training through transformers' Trainer: pretraining on packed text, LoRA on answers.

One process or many (`accelerate launch`), fp32 or bf16, from the start or from a snapshot: the same batches in the same
order, so the machine changes a result by rounding at most.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm import processes
from portllm.errors import CheckpointError, MachineError, ParamsError
from portllm.lm import opening
from portllm.lm.data.encoding import Example
from portllm.lm.learning import loop, resuming
from portllm.lm.learning.batches import Collator, Counter, GlobalBatches
from portllm.lm.learning.loading import computes_in
from portllm.lm.learning.machine import Meter
from portllm.lm.learning.snapshots import Snapshots

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from portllm.params import OptimParams

OnMetrics = loop.OnMetrics
OnProgress = loop.OnProgress


@dataclass(frozen=True)
class Fitted:
    """What a training gave: the history (step, loss, learning_rate), what it cost, and the weights it trained.

    `weights` is None where the model itself holds them whole; sharded over processes, they are gathered here (CPU).
    """

    history: list[dict[str, float]]
    cost: Mapping[str, float]
    weights: Mapping[str, Tensor] | None = None


def last_loss(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The loss of the last row as a metric; nothing where training was too short to log one."""
    return {"loss": history[-1]["loss"]} if history else {}


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
    on_note: Callable[[str], object] = lambda _: None,
) -> Fitted:
    """Train `model` in place, and go on from the last snapshot in `checkpoints`, if any.

    The same inputs on the same machine give byte-identical weights, stopped and resumed or not. `on_metrics(step,
    metrics)` is called with each row of the history as it comes, `on_progress(step, steps)` after each step.
    Raises ParamsError, CheckpointError and MachineError.
    """
    known = _known_tokens(model, tokenizer, examples)
    if optim.gradient_checkpointing:
        _recompute(model)
    counter, meter = Counter(), Meter()
    with tempfile.TemporaryDirectory() as scratch, _threads(optim.threads), _refusals_of_the_machine():
        arguments = _arguments(optim, seed, len(examples), scratch)
        if processes.count() == 1:
            arguments._n_gpu = min(arguments.n_gpu, 1)  # or DataParallel splits each batch over all GPUs there are
        snapshots = Snapshots(checkpoints, on_note) if checkpoints and optim.save_steps else None
        plan = loop.Plan(
            batches=_batches(examples, optim, seed),
            snapshots=snapshots,
            resumed=_resumed(snapshots, on_note),
            on_metrics=on_metrics,
            on_progress=on_progress,
        )
        # many bases have no token for padding, or no row for it; it carries no loss, and no token of the text sees it
        padding = tokenizer.pad_token_id or 0
        collator = Collator(padding if padding < known else 0, counter)
        trainer = loop.planned_trainer(
            plan, model=model, args=arguments, train_dataset=examples, data_collator=collator
        )
        if processes.index():
            _other_dropout(seed)
        with meter.running():
            trainer.train(resume_from_checkpoint=plan.checkpoint(Path(scratch)))
        history = [loop.row(entry) for entry in trainer.state.log_history if "loss" in entry]
        fitted = Fitted(history, meter.figures(counter.tokens, counter.useful), _gathered(model))
    model.eval()
    return fitted


def _known_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> int:
    """How many tokens `model` has rows for. Raises CheckpointError where `examples` hold another."""
    known = opening.known_tokens(model)
    if len(tokenizer) > known:  # not wrong in itself: some have tokens for pictures, which no text comes to
        highest = max(max(example["input_ids"]) for example in examples)
        if highest >= known:
            raise CheckpointError(opening.unknown(highest, known))
    return known


def _batches(examples: Sequence[Example], optim: OptimParams, seed: int) -> GlobalBatches:
    lengths = [len(example["input_ids"]) for example in examples] if optim.group_by_length else None
    return GlobalBatches(
        len(examples), optim.batch_size, seed, lengths=lengths, index=processes.index(), count=processes.count()
    )


def _resumed(snapshots: Snapshots | None, on_note: Callable[[str], object]) -> resuming.Resumed | None:
    """The last snapshot, on its way to every process."""
    if snapshots is None:
        return None
    resumed = resuming.Resumed(snapshots.newest() if processes.is_main() else None)
    if resumed:
        on_note(f"going on after step {resumed.step}, where an earlier run was stopped")
    return resumed


def _recompute(model: PreTrainedModel | PeftModel) -> None:
    """Keep no activations between forward and backward but each layer's input: less memory, a fifth more time."""
    # renamed in transformers 5.2x
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()


def _other_dropout(seed: int) -> None:
    """Trainer seeds every process alike: they would all drop the same places of different rows."""
    import torch

    torch.manual_seed(seed + processes.index())


def _gathered(model: PreTrainedModel | PeftModel) -> dict[str, Tensor] | None:
    """The trained weights, whole, where they are sharded over processes; every process has to call it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(hasattr(parameter, "full_tensor") for parameter in trained.values()):
        return None
    return {name: resuming.whole(parameter) for name, parameter in trained.items()}


def rows_per_process(optim: OptimParams) -> int:
    """Each process's share of a batch. Raises ParamsError where the processes cannot share it evenly."""
    rows, left = divmod(optim.batch_size, processes.count())
    if left or not rows:
        raise ParamsError(
            f"optim.batch_size counts the rows of all processes together: expected a multiple of the "
            f"{processes.count()} processes, found {optim.batch_size}"
        )
    return rows


def _arguments(optim: OptimParams, seed: int, rows: int, scratch: str) -> TrainingArguments:
    from transformers import TrainingArguments

    precision = computes_in(optim.precision)
    return TrainingArguments(
        output_dir=scratch,
        learning_rate=optim.learning_rate,
        num_train_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        per_device_train_batch_size=rows_per_process(optim),
        gradient_accumulation_steps=optim.gradient_accumulation,
        lr_scheduler_type=optim.schedule,
        lr_scheduler_kwargs=_schedule_settings(optim, rows),
        warmup_steps=optim.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=optim.logging_steps,
        seed=seed,
        data_seed=seed,
        bf16=precision == "bf16",
        use_cpu=_on_cpu(precision),
        save_strategy="steps" if optim.save_steps else "no",
        save_steps=optim.save_steps or 1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,  # a loss that is not a number is shown as such
    )


def _on_cpu(precision: str) -> bool:
    """Whether to say outright that the CPU computes, which transformers wants with bf16 or several processes."""
    import torch

    return not torch.cuda.is_available() and (precision == "bf16" or processes.count() > 1)


def _schedule_settings(optim: OptimParams, rows: int) -> dict[str, Any]:
    if optim.schedule != "warmup_stable_decay":
        return {}
    return {"num_decay_steps": round(_steps(optim, rows) * optim.decay_ratio)}


def _steps(optim: OptimParams, rows: int) -> int:
    """All steps of a training on `rows` rows, as Trainer counts them."""
    batches = math.ceil(rows / optim.batch_size)
    return optim.max_steps or math.ceil(optim.epochs * math.ceil(batches / optim.gradient_accumulation))


@contextlib.contextmanager
def _refusals_of_the_machine() -> Iterator[None]:
    """Too little memory on a GPU, and another process's end, as errors that say what to do."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the GPU's memory is too small for this training; lower optim.batch_size and raise "
            "optim.gradient_accumulation, set optim.gradient_checkpointing, or train.quantization: 4bit"
        ) from error
    except RuntimeError as error:
        if processes.count() == 1:
            raise
        raise MachineError(f"training stopped, perhaps because another process ended ({_line(error)})") from error


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with `count` threads (0: as it is): sums are rounded in another order with another number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
