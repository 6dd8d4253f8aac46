"""evaluate on the command line: what goes to stdout is one answer, whatever libraries print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from portllm.cli import main
from portllm.verbs import evaluate


@pytest.fixture
def model(tmp_path: Path, make_checkpoint: Any) -> Path:
    import torch

    return make_checkpoint(tmp_path / "model", {"a.weight": torch.ones(2)})


@pytest.mark.parametrize("words", [["--json"], []])
def test_stdout_holds_the_answer_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """issue 8, item 16: a task's own code and MLflow print to stdout."""

    def noisy(**arguments: Any) -> evaluate.Evaluation:
        print("from a library")  # noqa: T201
        arguments["out"].write_text("{}")
        return evaluate.Evaluation(model="model", fingerprint="ab", data={}, scores=())

    monkeypatch.setattr(evaluate, "run", noisy)
    command = ["--no-track", "evaluate", str(model), "--tasks", "sst2", "--out", str(tmp_path / "o.json"), *words]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "from a library" in result.stderr
    assert json.loads(result.stdout)["results"] == [] if words else result.stdout.strip() == ""


def test_own_task_is_handed_to_the_verb(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """issue 8, item 2: by hand every patch is scored on every task; the pipeline's stage passes --own-task."""
    calls: list[bool] = []

    def record(*, own_task: bool, out: Path, **_: Any) -> evaluate.Evaluation:
        calls.append(own_task)
        out.write_text("{}")
        return evaluate.Evaluation(model="model", fingerprint="ab", data={}, scores=())

    monkeypatch.setattr(evaluate, "run", record)
    for words in ([], ["--own-task"]):
        command = ["--no-track", "evaluate", str(model), "--tasks", "sst2", "--out", str(tmp_path / "o.json"), *words]
        assert CliRunner().invoke(main, command).exit_code == 0
    assert calls == [False, True]
    stages = (Path(__file__).parents[2] / "dvc.yaml").read_text(encoding="utf-8")
    assert "--own-task" in stages.partition("  evaluate:")[2].partition("    deps:")[0]
