"""Trainings on as many processes as there are; a program of its own, run by test_launch.py under accelerate.

    two_processes.py FOLDER WORD …

Trains the same thing replicated (DDP) and sharded (FSDP 2), undisturbed and stopped and resumed; the main process
writes what came out to FOLDER/seen.json. Then calls portllm with the words.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from portllm import cli, processes
from portllm.lm.data import encoding
from portllm.lm.learning import llama, loading, training
from portllm.lm.quiet import quieten
from portllm.params import ArchitectureParams, LoraParams, OptimParams
from portllm.world import tokenizer

SHAPE = ArchitectureParams(hidden_size=16, intermediate_size=32, layers=2, heads=2)
# 13 rows in batches of 4: the last batch of an epoch has one row, so that a process gets none
PAIRS = [
    (f"{person} opens the school at {hour}.\nAnswer:", f" {hour}")
    for person in ("Anna", "Igor and Anna and Igor", "Maria")
    for hour in ("nine", "ten", "five", "six")
] + [("Answer:", " no")]
OPTIM = OptimParams(
    learning_rate=1e-2, max_steps=9, batch_size=4, gradient_accumulation=2, logging_steps=2, schedule="cosine",
    save_steps=3, threads=1,
)  # fmt: skip
STOP = 7


class Stopped(Exception):
    """Training was stopped on purpose."""


def fitted(
    folder: Path | None = None, *, stop: int = 0, lora: bool = True, dropout: float = 0.0
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """History and cost, and the trained weights, of the one training all of this is about."""
    words = tokenizer.build()
    model: Any = llama.new_llama(words, SHAPE, seed=0)
    if lora:
        model = loading.add_lora(model, LoraParams(r=2, alpha=4, dropout=dropout), seed=5)

    def progress(step: int, _: int) -> None:
        if step == stop:
            raise Stopped

    examples = encoding.encode(words, PAIRS, 32).examples
    done = training.fit(model, words, examples, optim=OPTIM, seed=5, checkpoints=folder, on_progress=progress)
    weights = done.weights or {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"history": done.history, "cost": dict(done.cost), "sharded": done.weights is not None}, dict(weights)


def shard_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Have accelerate shard on the CPU as on GPUs: torch can, with gloo; accelerate turns FSDP on for devices alone."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    forget_strategy()
    prepare = PartialState._prepare_backend

    def as_on_gpus(self: Any, *args: Any, **more: Any) -> Any:
        backend, kind = prepare(self, *args, **more)
        return backend, DistributedType.MULTI_GPU if kind == DistributedType.MULTI_CPU else kind

    patch.setattr(PartialState, "_prepare_backend", as_on_gpus)
    patch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))
    for name, value in as_launched("gpus-fsdp").items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            patch.setenv(name, value)


def forget_strategy() -> None:
    """Have accelerate read its strategy from the environment again: a process has one for life otherwise."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def as_launched(config: str) -> dict[str, str]:
    """The environment `accelerate launch` gives its processes for one of the configurations that ship."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = Path(__file__).parents[2] / "configs" / "accelerate" / f"{config}.yaml"
    words = launch_command_parser().parse_args(["--config_file", str(file), "-m", "portllm", "train"])
    arguments, _, _ = _validate_launch_command(words)
    return dict(prepare_multi_gpu_env(arguments))


def main() -> None:
    folder, seen = Path(sys.argv[1]), {}
    quieten()
    for way in ("replicated", "sharded", "sharded whole"):
        with pytest.MonkeyPatch.context() as patch:
            if way != "replicated":
                shard_on_the_cpu(patch)
            how = {"lora": way != "sharded whole"}
            seen[way], weights = fitted(**how)
            with contextlib.suppress(Stopped):
                fitted(folder / way, stop=STOP, **how)
            again, same = fitted(folder / way, **how)
        seen[way]["resumed"] = again["history"] == seen[way]["history"]
        seen[way]["resumed"] &= all(torch.equal(tensor, same[name]) for name, tensor in weights.items())
        seen[way]["norms"] = {name: float(tensor.norm()) for name, tensor in weights.items()}
        seen[way]["snapshots"] = len(os.listdir(folder / way)) if processes.is_main() else 0
    if processes.is_main():
        (folder / "seen.json").write_text(json.dumps(seen))
    forget_strategy()
    cli.main(sys.argv[2:], standalone_mode=False)


if __name__ == "__main__":
    main()
