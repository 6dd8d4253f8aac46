"""Print the way of one patch tensor through a merged port, call by call, and count the files that it enters.

    python benchmarks/walk.py --count held    # PYTHONPATH=CLONE measures another version of portllm

A patch of one module is ported in this process. A call of a named function of portllm counts where it has the lora_A in
an argument. There are four definitions; each includes the one before:

    handed   an argument other than self is the tensor: its TensorEntry, its values as an array, or an object made of it
             (a class in MADE, or one in EDITED with an edit), alone or in a list, tuple or dict
    touched  or self is one: a method or property of the tensor's own objects
    held     or an argument or self is an object of portllm that contains one: header, patch, plan, planner, slot …
    named    or an argument is the name of the tensor, its module or its weight, or collects one

Consecutive calls in one file are one entry; an entry into a file that was left before is a return. Closures, partials
and iterators are not opened. Lambdas, comprehensions, resumed generators and generated methods do not count. Calls in
worker threads count in the order of time, so `held` and `named` vary by a few entries between runs.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

MODULE = "model.layers.0.self_attn.q_proj"
TENSOR = f"base_model.model.{MODULE}.lora_A.weight"
RANK, INPUTS, OUTPUTS, VOCABULARY = 3, 64, 48, 11  # no other tensor has the axes of lora_A: 3 and 64
DEFINITIONS = ("handed", "touched", "held", "named")
# names of classes; Piece, Block and Part are the names of the ones before them until November 2026
MADE = {"LoraPair", "LowRank", "Update", "AddLora", "Factors", "RowFactors", "Panels"}
MADE |= {"BlockUpdate", "Piece"} | {"PlacedUpdate", "Block"}
EDITED = {"Change", "Target"} | {"TensorSegment", "Part"}  # without an edit they are the base's alone
COLLECTIONS = (list, tuple, dict, set, frozenset)
DEPTH = 6  # of objects and collections within each other
Call = tuple[str, str, int]  # file, function, index of the narrowest definition that counts it


def carries(value: Any, depth: int, *, held: bool) -> bool:
    """Return whether a value is the tensor, is made of it or collects such objects; with `held`, or contains one."""
    kind = type(value)
    if kind.__name__ == "TensorEntry":
        return bool(value.name == TENSOR)
    if kind.__name__ in ("ndarray", "Tensor"):
        return sorted(value.shape) == [RANK, INPUTS]
    if kind.__name__ in MADE or (kind.__name__ in EDITED and getattr(value, "edit", None) is not None):
        return True
    if held and kind.__module__.startswith("portllm."):
        value = getattr(value, "__dict__", None)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return depth > 0 and any(carries(part, depth - 1, held=held) for part in list(parts))


def definition(frame: FrameType) -> int | None:
    """Return the index of the narrowest definition that counts a call, None where none does."""
    code, arguments = frame.f_code, inspect.getargvalues(frame)
    names = [*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], arguments.varargs, arguments.keywords]
    values = {name: arguments.locals.get(name) for name in names if name}
    own, others = values.pop("self", None), list(values.values())
    for index, (value, held) in enumerate(((others, False), (own, False), ([own, *others], True))):
        if carries(value, DEPTH, held=held):
            return index
    texts = [text for value in others for text in (value if isinstance(value, COLLECTIONS) else (value,))]
    return 3 if any(isinstance(text, str) and text in (TENSOR, MODULE, f"{MODULE}.weight") for text in texts) else None


class Recorder:
    """The calls with the tensor so far, in order."""

    def __init__(self, root: str) -> None:
        """Record calls of the functions in files whose paths start with `root`."""
        self.calls: list[Call] = []
        self._root, self._started = root, set[FrameType]()  # generators already started

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        """Record a call, as sys.setprofile reports it."""
        code = frame.f_code
        named = code.co_filename.startswith(self._root) and not code.co_name.startswith("<")
        if event != "call" or not named or frame in self._started:
            return
        if code.co_flags & inspect.CO_GENERATOR:
            self._started.add(frame)
        if (narrowest := definition(frame)) is not None:
            self.calls.append((code.co_filename.removeprefix(self._root), code.co_name, narrowest))


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Write a Llama of one linear module, in bf16, and a patch of it; return their directories."""
    import torch
    from safetensors.torch import save_file

    base, patch = folder / "base", folder / "patch"
    shapes = {f"{MODULE}.weight": (OUTPUTS, INPUTS), "model.norm.weight": (INPUTS,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, INPUTS))
    weights = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    factors = {TENSOR: torch.ones(RANK, INPUTS), TENSOR.replace("lora_A", "lora_B"): torch.ones(OUTPUTS, RANK)}
    llama = {"model_type": "llama", "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"]}
    for path, prefix, tensors, config in ((base, "", weights, llama), (patch, "adapter_", factors, lora)):
        path.mkdir()
        save_file(tensors, path / f"{prefix}model.safetensors")
        (path / f"{prefix}config.json").write_text(json.dumps(config))
    return base, patch


def record_port(folder: Path) -> list[Call]:
    """Port the patch in `folder` and return the calls with its tensor."""
    from portllm.params import PortParams
    from portllm.verbs import port

    base, patch = make_inputs(folder)
    recorder = Recorder(f"{Path(port.__file__).parents[1]}/")
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    port.run(patch=patch, onto=base, out=folder / "out", params=PortParams())
    sys.setprofile(None)
    threading.setprofile(None)
    return recorder.calls


def main() -> None:
    """Print the walk under one definition, then the totals under every one."""
    parser = argparse.ArgumentParser(description="Print the way of one patch tensor through a port.")
    parser.add_argument("--count", choices=DEFINITIONS, default="handed", help="definition of the printed walk")
    chosen = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        calls = record_port(Path(folder))
    totals = []
    for index, name in enumerate(DEFINITIONS):
        left: set[str] = set()
        number, steps = 0, itertools.groupby((call for call in calls if call[2] <= index), key=lambda call: call[0])
        for number, (file, group) in enumerate(steps, 1):
            if name == chosen:
                functions = ", ".join(dict.fromkeys(function for _, function, _ in group))
                print(f"{number:3} {'↩' if file in left else ' '} {file}: {functions}")
            left.add(file)
        totals.append(f"{name:8}{len(left):3} files, {number:2} entries, {number - len(left):2} returns")
    print("\n".join(totals))


if __name__ == "__main__":
    main()
