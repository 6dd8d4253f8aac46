"""The way of one patch tensor through a port, call by call: which files of portllm it enters.

    python benchmarks/walk.py

Ports a patch of one module in this process and prints, in order, each file that is entered by a call with the tensor in
an argument: its TensorEntry, or a pair, update, change, target, segment or edit made of it, alone or in a collection.
Consecutive calls in one file count as one entry; an entry into a file that was left before is a return. Calls in worker
threads count where they happen.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

MODULE = "model.layers.0.self_attn.q_proj"
TENSOR = f"base_model.model.{MODULE}.lora_A.weight"
# the objects that are made of a tensor of the patch, by the names of their classes (before and after the rooms)
CARRIERS = frozenset({
    "LoraPair", "LowRank", "Piece", "BlockUpdate", "Change", "Target", "AddLora", "Block", "PlacedUpdate", "Update",
})  # fmt: skip
DEPTH = 5  # objects within objects


class Walk:
    """The files entered so far, each with the function that was called."""

    def __init__(self, package: Path, *, holders: bool) -> None:
        """Count calls in `package`; with `holders` those with a header, patch, plan … that holds the tensor, too."""
        self.steps: list[tuple[str, list[str]]] = []
        self._root, self._lock, self._holders = str(package) + os.sep, threading.Lock(), holders

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        """Record a call, as sys.setprofile reports it."""
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(self._root) or frame.f_code.co_name.startswith("<"):
            return
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
        if any(carries(frame.f_locals.get(name), DEPTH, holders=self._holders) for name in names):
            self._record(path.removeprefix(self._root), frame.f_code.co_name)

    def _record(self, file: str, function: str) -> None:
        with self._lock:
            if not self.steps or self.steps[-1][0] != file:
                self.steps.append((file, []))
            self.steps[-1][1].append(function)


def carries(value: Any, depth: int, *, holders: bool) -> bool:
    """Return whether a value is the tensor, is made of it, or is a collection of such; or, of `holders`, holds it."""
    kind = type(value)
    if kind.__name__ == "TensorEntry":
        return bool(value.name == TENSOR)
    if kind.__name__ in CARRIERS:
        return True
    if not depth:
        return False
    if isinstance(value, dict):
        return any(carries(one, depth - 1, holders=holders) for one in value.values())
    if isinstance(value, (tuple, list)):
        return any(carries(one, depth - 1, holders=holders) for one in value)
    own = holders and kind.__module__.startswith("portllm.") and getattr(value, "__dict__", None)
    return bool(own) and any(carries(one, depth - 1, holders=holders) for one in own.values())


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Write a base of two layers and a patch of one module; return their directories."""
    import torch
    from safetensors.torch import save_file

    base, patch = folder / "base", folder / "patch"
    base.mkdir()
    patch.mkdir()
    torch.manual_seed(0)
    weights = {f"{MODULE}.weight": torch.randn(8, 8), "model.norm.weight": torch.randn(8)}
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    factors = {TENSOR: torch.randn(2, 8), TENSOR.replace("lora_A", "lora_B"): torch.randn(8, 2)}
    save_file(factors, patch / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (patch / "adapter_config.json").write_text(json.dumps(config))
    return base, patch


def walk(folder: Path, *, holders: bool) -> Walk:
    """Port the patch once and return the files that its tensor entered."""
    import portllm
    from portllm.params import PortParams
    from portllm.verbs import port

    base, patch = make_inputs(folder)
    steps = Walk(Path(portllm.__file__).parent, holders=holders)
    threading.setprofile(steps)
    sys.setprofile(steps)
    try:
        port.run(patch=patch, onto=base, out=folder / "out", params=PortParams())
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return steps


def lines(steps: Walk) -> Iterator[str]:
    """Yield one line per entry, then the totals."""
    left: set[str] = set()
    returns = 0
    for number, (file, functions) in enumerate(steps.steps, 1):
        back = file in left
        returns += back
        left.add(file)
        yield f"{number:3} {'↩' if back else ' '} {file}: {', '.join(dict.fromkeys(functions))}"
    yield f"{len(left)} files, {len(steps.steps)} entries, {returns} returns to a file already left"


def main() -> None:
    """Print the way of the tensor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--holders", action="store_true", help="count calls with a patch, plan … that holds it, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        print("\n".join(lines(walk(Path(folder), holders=options.holders))))


if __name__ == "__main__":
    main()
