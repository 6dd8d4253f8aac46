"""Ports that are killed at a step of theirs; a program of its own, run by test_kills.py.

    killed_port.py PATCH BASE OUT MOMENTS [adapter] [force]

A step is whatever changes the disk or moves data: files opened, made, renamed and removed, locks, writes, syncs, and
the bytes counted by the progress. A first port counts them; then one after the other is killed (SIGKILL) at MOMENTS,
two thirds of them spread evenly over all steps and one third at the last ones, looked at, and run again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from portllm.checkpoint.files import hashing as fingerprint
from portllm.params import PortParams
from portllm.verbs import port

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock", "shutil.rmtree"}
CALLS = ("fsync", "pwrite", "write", "copy_file_range", "ftruncate", "close")
PATCH, BASE, OUT = (Path(word) for word in sys.argv[1:4])
MOMENTS, MORE = int(sys.argv[4]), sys.argv[5:]
CACHE = Path(os.environ["XDG_CACHE_HOME"])
OLD = OUT.parent.parent / "old"


def files(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its digest."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def run(step: Callable[[], Any], *, force: bool = False) -> None:
    """One port that calls `step` at each of its steps."""

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and not (event == "open" and str(args[0]).endswith((".py", ".pyc"))):
            step()

    def stepping(call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **more: Any) -> Any:
            step()
            return call(*args, **more)

        return stepped

    for name in CALLS:
        setattr(os, name, stepping(getattr(os, name)))
    sys.addaudithook(hear)
    params = PortParams(as_="adapter" if "adapter" in MORE else "merged")
    port.run(
        patch=PATCH, onto=BASE, out=OUT, params=params, force=force or "force" in MORE, on_progress=lambda *_: step()
    )


def child(work: Callable[[], Any]) -> int:
    """Run `work` in a fork; its exit status, negative where a signal ended it."""
    shutil.rmtree(CACHE, ignore_errors=True)
    started = os.fork()
    if started == 0:
        try:
            fingerprint.SETTLED_NS = -(1 << 62)  # so that the cache of digests is written, too
            work()
        except BaseException as error:  # noqa: BLE001  (the parent shall hear of it)
            print(repr(error), file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(started, 0)[1])


def count() -> int:
    """The steps of an undisturbed port."""
    reading, writing = os.pipe()

    def work() -> None:
        steps = itertools.count(1)
        made = [0]
        run(lambda: made.append(next(steps)))
        os.write(writing, str(max(made)).encode())

    assert child(work) == 0
    return int(os.read(reading, 100))


def killed_at(moment: int) -> int:
    """A port killed at that step: its exit status."""

    def work() -> None:
        steps, lock = itertools.count(1), threading.Lock()

        def step() -> None:
            with lock:
                if next(steps) >= moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        run(step)

    return child(work)


def reset() -> None:
    """OUT as it is before each port: absent, or what an earlier port of something else left."""
    shutil.rmtree(OUT.parent)
    OUT.parent.mkdir()
    if "force" in MORE:
        shutil.copytree(OLD, OUT)


def main() -> None:
    """Kill, look, run again; print what was seen."""
    OUT.parent.mkdir()
    OLD.mkdir()
    (OLD / "old").write_text("1")
    reset()
    steps = count()
    whole = files(OUT)
    seen: dict[str, int] = {"killed": 0, "absent": 0, "whole": 0, "old": 0, "left": 0, "steps": steps}
    last = MOMENTS // 3
    even = [1 + i * (steps - last - 1) // (MOMENTS - last) for i in range(MOMENTS - last)]
    for moment in (*even, *range(steps - last + 1, steps + 1)):
        reset()
        seen["killed"] += killed_at(moment) == -signal.SIGKILL
        state = "absent" if not OUT.exists() else {str(whole): "whole", str(files(OLD)): "old"}.get(str(files(OUT)))
        assert state is not None, f"OUT is half after step {moment} of {steps}"
        seen[state] += 1
        left = {p.name for p in OUT.parent.iterdir()} - {OUT.name}
        assert left <= {f".{OUT.name}.{kind}" for kind in ("partial", "replaced", "discarded")}, left
        seen["left"] += bool(left)
        kept = [folder for folder in (OUT, OUT.parent / f".{OUT.name}.replaced") if folder.exists()]
        assert "force" not in MORE or any(files(folder) in (files(OLD), whole) for folder in kept), "nothing is whole"
        assert child(lambda: run(lambda: None, force=OUT.exists())) == 0, f"after step {moment} of {steps}"
        assert files(OUT) == whole, f"another result after step {moment} of {steps}"
        assert os.listdir(OUT.parent) == [OUT.name], f"leftovers after step {moment} of {steps}"
    print(json.dumps(seen))  # noqa: T201


torch.set_num_threads(1)
main()
