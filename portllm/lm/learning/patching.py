"""The making of a patch: a LoRA trained on a task's answers, saved as PEFT saves it, byte-identical each time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.checkpoint.files.names import ADAPTER_CONFIG
from portllm.lm.data import encoding
from portllm.lm.learning import loading, snapshots, training
from portllm.lm.quiet import quieten
from portllm.params import TrainParams

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


@dataclass(frozen=True)
class TrainedPatch:
    """A trained patch in memory, with its curve, the counts of its rows, and the cost of its training."""

    model: PeftModel
    history: Sequence[Mapping[str, float]]
    metrics: Mapping[str, float]
    cost: Mapping[str, float]
    weights: Mapping[str, Tensor] | None = None

    def save(self, folder: Path, *, base_name: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, naming the base without a machine's path."""
        # of an adapted embedding PEFT would save the base's own weights too, which would replace another release's
        self.model.save_pretrained(str(folder), state_dict=self.weights, save_embedding_layers=False)
        path = folder / ADAPTER_CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base_name
        # PEFT keeps a set: its order would differ from process to process
        for key in ("target_modules", "modules_to_save"):
            if isinstance(config.get(key), list):
                config[key] = sorted(config[key])
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(
    base: Path,
    pairs: Sequence[tuple[str, str]],
    params: TrainParams,
    *,
    on_metrics: training.OnMetrics | None = None,
    on_progress: training.OnProgress | None = None,
    checkpoints: Path | None = None,
    on_note: Callable[[str], object] = lambda _: None,
) -> TrainedPatch:
    """Train a LoRA on `base` on (prompt, answer) pairs, with a loss on the answers only (see `training.fit`).

    Raises DataError, CheckpointError, ParamsError and MachineError.
    """
    quieten()
    tokenizer = loading.tokenizer_of(base)
    encoded = encoding.encode(tokenizer, pairs, params.max_length)
    for note in encoded.notes(params.max_length):
        on_note(note)
    model = loading.frozen_base(base, params.optim, params.quantization)
    adapted = loading.add_lora(model, params.lora, params.seed)
    trainable = adapted.num_parameters(only_trainable=True)  # once sharded, a process has its share alone
    fitted = training.fit(
        adapted, tokenizer, encoded.examples, optim=params.optim, seed=params.seed,
        on_metrics=on_metrics, on_progress=on_progress, checkpoints=checkpoints, on_note=on_note,
    )  # fmt: skip
    if does_nothing(fitted.weights or dict(snapshots.trained(adapted))):
        on_note("the patch changes nothing: each of its updates is zero; raise optim.learning_rate or optim.max_steps")
    metrics = {
        "loss": fitted.loss,
        "rows": len(encoded.examples),
        "rows_cut": encoded.cut,
        "rows_dropped": encoded.dropped,
        "trainable_parameters": trainable,
    }
    return TrainedPatch(adapted, fitted.history, metrics, fitted.cost, fitted.weights)


def does_nothing(weights: Mapping[str, Tensor]) -> bool:
    """Return whether every update B·A of the LoRA `weights` is zero, because one of its factors is."""
    zeros: dict[str, bool] = {}
    for name, factor in weights.items():
        module = name.partition(".lora_")[0]
        zeros[module] = zeros.get(module, False) or not factor.any()
    return all(zeros.values())
