"""A patch's making: a LoRA trained on a task's answers, saved as PEFT saves it, byte for byte the same each time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.lm import encoding, training
from portllm.lm.quiet import quieten
from portllm.params import TrainParams

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class TrainedPatch:
    """A patch just trained, in memory, with its curve and what became of its rows."""

    model: PeftModel
    history: Sequence[Mapping[str, float]]
    metrics: Mapping[str, float]

    def save(self, folder: Path, *, base_name: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, naming the base without a machine's path."""
        self.model.save_pretrained(str(folder))
        path = folder / CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base_name
        # PEFT keeps a set: its order would differ from process to process
        for key in ("target_modules", "modules_to_save"):
            if isinstance(config.get(key), list):
                config[key] = sorted(config[key])
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(
    base: Path, pairs: Sequence[tuple[str, str]], params: TrainParams, *, on_metrics: training.OnMetrics | None = None
) -> TrainedPatch:
    """A LoRA on `base` trained on (prompt, answer) pairs, loss on the answers only. Raises DataError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quieten()
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = encoding.encode(tokenizer, pairs, params.max_length)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    patched = training.add_lora(model, params.lora, params.seed)
    history = training.fit(
        patched, tokenizer, encoded.examples, optim=params.optim, seed=params.seed, on_metrics=on_metrics
    )
    metrics = {
        **training.last_loss(history),
        "rows": len(encoded.examples),
        "rows_cut": encoded.cut,
        "rows_dropped": encoded.dropped,
        "trainable_parameters": patched.num_parameters(only_trainable=True),
    }
    return TrainedPatch(patched, history, metrics)
