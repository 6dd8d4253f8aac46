"""Training through transformers' Trainer: pretraining on packed text, LoRA on answers."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from portllm.lm.encoding import IGNORED, Example

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from portllm.params import LoraParams, OptimParams

OnMetrics = Callable[[int, Mapping[str, float]], None]


def last_loss(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The loss of the last row as a metric; nothing where training was too short to log one."""
    return {"loss": history[-1]["loss"]} if history else {}


def add_lora(model: PreTrainedModel, lora: LoraParams, seed: int) -> PeftModel:
    """`model` with a fresh LoRA (arXiv:2106.09685) on every target module; only the LoRA is trainable."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # a list, not a set: the order is written into adapter_config.json
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
    )
    with warnings.catch_warnings():
        # PEFT asks for a property that transformers is renaming
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return get_peft_model(model, config)


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """The base with its LoRA added into the weights, W + scaling · B·A: an ordinary checkpoint again."""
    return model.merge_and_unload()


def fit(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    optim: OptimParams,
    seed: int,
    on_metrics: OnMetrics | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place; the history as rows of step, loss and learning_rate.

    The same inputs on the same machine give byte-identical weights. `on_metrics(step, metrics)` is
    called with each row as it comes.
    """
    from transformers import PrinterCallback, Trainer

    with tempfile.TemporaryDirectory() as scratch, _threads(optim.threads):
        trainer = Trainer(
            model=model,
            args=_arguments(optim, seed, scratch),
            train_dataset=list(examples),
            # many bases have no token for padding; it carries no loss, and no token of the text sees it
            data_collator=Collator(tokenizer.pad_token_id or 0),
            callbacks=[_listener(on_metrics)] if on_metrics else None,
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to --json
        trainer.train()
    model.eval()
    return [_row(entry) for entry in trainer.state.log_history if "loss" in entry]


@dataclass(frozen=True)
class Collator:
    """Examples to a batch: input_ids and labels, int64 (rows, longest example), padded on the right.

    No attention mask: under causal attention no token of the text sees the padding behind it, and
    without a mask the fast attention kernel is taken.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        import torch

        longest = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        return {
            key: torch.tensor([example[key] + [value] * (longest - len(example[key])) for example in examples])
            for key, value in fill.items()
        }


def _arguments(optim: OptimParams, seed: int, scratch: str) -> TrainingArguments:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=scratch,
        learning_rate=optim.learning_rate,
        num_train_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        per_device_train_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.gradient_accumulation,
        lr_scheduler_type=optim.schedule,
        lr_scheduler_kwargs=_schedule_settings(optim),
        warmup_steps=optim.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=optim.logging_steps,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_nan_inf_filter=False,  # a loss that is not a number is shown as such
    )


def _schedule_settings(optim: OptimParams) -> dict[str, Any]:
    if optim.schedule != "warmup_stable_decay":
        return {}
    return {"num_decay_steps": round(optim.max_steps * optim.decay_ratio)}


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


def _listener(on_metrics: OnMetrics) -> TrainerCallback:
    from transformers import TrainerCallback

    class Listener(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
        """Hands each logged row on as it comes."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
            if logs and "loss" in logs:
                row = _row({**logs, "step": state.global_step})
                on_metrics(int(row.pop("step")), row)

    return Listener()


def _row(entry: Mapping[str, float]) -> dict[str, float]:
    return {"step": int(entry["step"]), "loss": float(entry["loss"]), "learning_rate": float(entry["learning_rate"])}
