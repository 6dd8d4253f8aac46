"""Two processes by `accelerate launch` on this machine's CPU: the same training as on one, and one voice."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from portllm import cli

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "lm" / "two_processes.py"
CONFIG = ROOT / "configs" / "accelerate" / "cpu-2.yaml"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
TASK = "world_sst2"
FLAGS = "--max-length 64 --lora-r 2 --lora-dropout 0 --batch-size 8 --logging-steps 2 --threads 1 --save-steps 2"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone() -> ModuleType:
    """The program that is launched, to be called on one process as well."""
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, alone: ModuleType) -> Path:
    """A base and data to train on."""
    from portllm.lm.learning import llama
    from portllm.params import PrepareParams
    from portllm.verbs import prepare
    from portllm.world import tokenizer

    root = tmp_path_factory.mktemp("project")
    words = tokenizer.build()
    llama.new_llama(words, alone.SHAPE, seed=0).save_pretrained(root / "base")
    words.save_pretrained(root / "base")
    prepare.run(dataset=TASK, out=root / "data" / TASK, params=PrepareParams(train_rows=42, test_rows=40))
    return root


def words(out: str, steps: int) -> str:
    """A training, as words of the command line."""
    return (
        f"train --json --base base --task {TASK} --data data --out {out} --cost cost.json --max-steps {steps} {FLAGS}"
    )


def start(root: Path, out: str, steps: int, *more: str) -> subprocess.Popen[str]:
    """`portllm train` on two processes."""
    command = [sys.executable, "-m", "portllm", *words(out, steps).split(), *more]
    env = {**ENV, "PORTLLM_ACCELERATE": str(CONFIG)}
    return subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_replicated_and_sharded_training_are_what_one_process_does(
    alone: ModuleType, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command = [*launch, str(SCRIPT), str(tmp_path), *words("many", 6).split()]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    _check_training(alone, tmp_path)

    assert json.loads(done.stdout)["metrics"]["rows"] == 42
    assert "2 processes" in done.stderr
    assert [p.name for p in project.iterdir() if "many" in p.name] == ["many"]
    assert (project / "many" / "patch.json").is_file()
    cost = json.loads((project / "cost.json").read_text())
    assert cost["processes"] == 2
    # its weights are read as any patch's, and learnt what one process learns
    monkeypatch.chdir(project)
    cli.main(words("one", 6).split(), standalone_mode=False)
    many, one = (_losses(project / name / "history.csv") for name in ("many", "one"))
    assert list(many) == list(one) == [2, 4, 6]
    assert list(many.values()) == pytest.approx(list(one.values()), rel=2e-6)


def _losses(path: Path) -> dict[int, float]:
    lines = [line.split(",") for line in path.read_text().splitlines()[1:]]
    return {int(step): float(loss) for step, loss, _ in lines}


def _check_training(alone: ModuleType, tmp_path: Path) -> None:
    seen = json.loads((tmp_path / "seen.json").read_text())
    for way, lora in (("replicated", True), ("sharded", True), ("sharded whole", False)):
        one, weights = alone.fitted(lora=lora)
        many = seen[way]
        assert many["sharded"] == way.startswith("sharded")
        assert many["resumed"], f"{way}: stopped and resumed, it is another training"
        assert many["snapshots"] == 2
        assert [row["step"] for row in many["history"]] == [row["step"] for row in one["history"]] == [2, 4, 6, 8, 9]
        for a, b in zip(many["history"], one["history"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
            assert a["learning_rate"] == b["learning_rate"]
        norms = {name: float(tensor.norm()) for name, tensor in weights.items()}
        assert many["norms"] == pytest.approx(norms, rel=1e-4)
        assert many["cost"]["processes"] == 2


def test_one_process_killed_ends_all_and_snapshots_alone_are_left(project: Path) -> None:
    running = start(project, "killed", 2000)
    other = _worker(running.pid, rank=1, snapshots=project / ".killed.kept")
    os.kill(other.pid, signal.SIGKILL)
    stdout, stderr = running.communicate(timeout=90)
    assert running.returncode == 1, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert [p.name for p in project.iterdir() if "killed" in p.name] == [".killed.kept"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "5"], "multiple of the 2 processes, found 5"),
        (["--learning-rate", "1e30"], "training stopped at step "),  # issue 8, item 1: all processes end
    ],
)
def test_error_of_two_processes_is_one_line_and_leaves_nothing(project: Path, flags: list[str], message: str) -> None:
    stdout, stderr = (running := start(project, "wrong", 60, *flags)).communicate(timeout=90)
    assert running.returncode == 1
    assert stdout == ""
    errors = [line for line in stderr.splitlines() if not line.startswith("train: ")]
    assert len(errors) == 1, stderr
    assert errors[0].startswith("Error: ")
    assert message in errors[0]
    assert not [p for p in project.iterdir() if "wrong" in p.name]


def _worker(pid: int, *, rank: int, snapshots: Path) -> Any:
    """The process of that rank, once the training has snapshots."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if list(snapshots.glob("*/0*.safetensors")):
            for child in psutil.Process(pid).children(recursive=True):
                if child.environ().get("RANK") == str(rank):
                    return child
        time.sleep(0.05)
    raise AssertionError("no snapshot was written")
