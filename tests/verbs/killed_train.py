"""Trainings that are killed at a moment of theirs; a program of its own, run by test_train.py.

    killed_train.py BASE DATA OUT MOMENTS

A moment is whatever changes the disk, and each step of training. A first run counts them; then runs are killed
(SIGKILL) at MOMENTS spread over all of them, and run again to the end; the last one is killed three times on its way.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (once for all forks)
import torch
from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

from portllm.params import LoraParams, OptimParams, TrainParams
from portllm.verbs import train

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock", "shutil.rmtree"}
BASE, DATA, OUT = (Path(word) for word in sys.argv[1:4])
MOMENTS = int(sys.argv[4])
# nothing is a multiple of anything: epochs, log lines, snapshots and accumulated batches all end at different steps
OPTIM = OptimParams(
    learning_rate=1e-2, max_steps=14, batch_size=4, gradient_accumulation=2, logging_steps=5, save_steps=3, threads=1,
    schedule="cosine", warmup_ratio=0.2, weight_decay=0.1, group_by_length=True,
)  # fmt: skip
PARAMS = TrainParams(max_length=64, optim=OPTIM, lora=LoraParams(r=2, alpha=4, dropout=0.3))


def files(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its digest."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def run(step: Callable[[], Any], notes: list[str] | None = None) -> None:
    """One training that calls `step` at each of its moments."""
    sys.addaudithook(lambda event, _: step() if event in EVENTS else None)
    sync = os.fsync
    os.fsync = lambda handle: (step(), sync(handle))[1]  # type: ignore[assignment]
    note = (notes if notes is not None else []).append
    train.run(
        base=BASE, task="world_sst2", data=DATA, out=OUT, params=PARAMS, force=OUT.exists(),
        on_progress=lambda *_: step(), on_note=note,
    )  # fmt: skip


def child(work: Callable[[], Any]) -> int:
    """Run `work` in a fork; its exit status, negative where a signal ended it."""
    started = os.fork()
    if started == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001  (the parent shall hear of it)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(started, 0)[1])


def told(work: Callable[[], Any]) -> Any:
    """What `work` returns in a fork that must end well."""
    reading, writing = os.pipe()
    assert child(lambda: os.write(writing, json.dumps(work()).encode())) == 0
    return json.loads(os.read(reading, 10_000))


def count() -> int:
    """The moments of an undisturbed training."""
    moments = itertools.count()
    run(lambda: next(moments))
    return next(moments)


def finished() -> list[str]:
    """What a training says that is not killed."""
    notes: list[str] = []
    run(lambda: None, notes)
    return notes


def killed_at(moment: int) -> int:
    """A training killed at that moment: its exit status."""

    def work() -> None:
        moments = itertools.count(1)
        run(lambda: os.kill(os.getpid(), signal.SIGKILL) if next(moments) >= moment else None)

    return child(work)


def main() -> None:
    """Kill, run again, compare; print what was seen."""
    OUT.parent.mkdir()
    moments = told(count)
    whole = files(OUT)
    seen = {"moments": moments, "killed": 0, "resumed": 0, "damaged": 0}
    for i in range(MOMENTS):
        shutil.rmtree(OUT)
        seen["killed"] += killed_at(1 + i * (moments - 1) // (MOMENTS - 1)) == -signal.SIGKILL
        if i == MOMENTS - 1:
            seen["killed"] += sum(killed_at(moments // 3) == -signal.SIGKILL for _ in range(2))
        if i == MOMENTS // 2:
            seen["damaged"] += damage()
        notes = told(finished)
        seen["resumed"] += any("going on after step" in note for note in notes)
        assert (i == MOMENTS // 2) == any("damaged" in note for note in notes), notes
        assert files(OUT) == whole, f"another result after a kill at {i} of {MOMENTS}: {notes}"
        assert os.listdir(OUT.parent) == [OUT.name], f"leftovers after a kill at {i} of {MOMENTS}"
    print(json.dumps(seen))  # noqa: T201


def damage() -> bool:
    """Turn one byte of the newest snapshot round."""
    newest = max(OUT.parent.glob(f".{OUT.name}.kept/*/0*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-1] ^= 255
    newest.write_bytes(content)
    return True


torch.set_num_threads(1)
main()
