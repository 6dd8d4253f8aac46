"""A pipeline killed in the middle of training is finished by the next `dvc repro`, and nothing half-made is kept."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]
TRAIN = "train@world_sst2-v0"
PATCH = Path("models/patches/v0/world_sst2")


@pytest.fixture
def small(project: Callable[..., Any]) -> Any:
    """The real pipeline with so few rows and steps that a patch takes seconds."""
    import yaml

    one = project()
    one.env["SHELL"] = "/bin/sh"  # often stays between DVC and the stage, and outlives a killed DVC
    file = one.folder / "params.yaml"
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["prepare"] |= {"train_rows": 64, "test_rows": 40, "documents": 400}
    tree["fetch"]["optim"] |= {"max_steps": 2, "threads": 1}
    tree["train"]["optim"] |= {"max_steps": 100_000, "logging_steps": 1, "threads": 1}
    tree["train"]["per_task"] = {}
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return one


def test_a_pipeline_killed_in_training_is_finished_by_the_next_run(small: Any, forked: Path) -> None:
    alone = small.env["PATH"]
    small.env["PATH"] = os.pathsep.join([str(forked), alone])  # but for the stage that is killed
    small.dvc("repro", "-q", "fetch", "prepare@world_sst2")
    small.env["PATH"] = alone
    running = small.start("repro", "-q", TRAIN)
    partial = small.folder / PATCH.parent / f".{PATCH.name}.partial"
    stage = _wait_for_stage(running.pid, partial)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    _, alive = psutil.wait_procs([stage], timeout=15)
    assert not alive, "a stage outlived its pipeline"
    assert not (small.folder / PATCH).exists()

    small.env["PATH"] = os.pathsep.join([str(forked), alone])
    file = small.folder / "params.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("max_steps: 100000", "max_steps: 3"), encoding="utf-8")
    small.dvc("repro", "-q", TRAIN)
    assert json.loads((small.folder / PATCH / "patch.json").read_text())["task"] == "world_sst2"
    assert not partial.exists()
    assert [p.name for p in (small.folder / PATCH.parent).iterdir() if p.name != ".gitignore"] == [PATCH.name]


def _wait_for_stage(pid: int, partial: Path) -> psutil.Process:
    """The stage's process, once it trains (its OUT is being written)."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if partial.exists():
            stages = [p for p in psutil.Process(pid).children(recursive=True) if "train" in p.cmdline()]
            if stages:
                time.sleep(1.0)
                return stages[0]
        time.sleep(0.1)
    raise AssertionError("training did not start")
