"""The command line keeps its promises: exit codes, one JSON object, one line per error, nothing heavy at import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from portllm import params
from portllm.cli import main, running

HEAVY = (
    "accelerate", "datasets", "dvc", "huggingface_hub", "jinja2", "lm_eval", "matplotlib", "mlflow", "numpy", "pandas",
    "peft", "pyarrow", "safetensors", "tokenizers", "torch", "transformers", "yaml",
)  # fmt: skip
VERBS = (
    "prepare",
    "fetch",
    "evolve",
    "train",
    "port",
    "verify",
    "evaluate",
    "report",
    "register",
    "fingerprint",
    "tasks",
    "doctor",
)


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


@pytest.mark.parametrize("module", ["portllm", "portllm.cli", "portllm.params", "portllm.tracking"])
def test_importing_the_command_line_loads_no_heavy_library(module: str) -> None:
    code = f"import {module}, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    done = call(verb, "--help")
    assert done.exit_code == 0
    assert f"portllm {verb}" in done.output
    assert "--json" in done.output


def test_the_verbs_stand_in_the_pipelines_order() -> None:
    listed = call("--help").output.split("Commands:")[1]
    assert [line.split()[0] for line in listed.strip().splitlines()] == list(VERBS)


def test_usage_errors_exit_with_two() -> None:
    assert call("port").exit_code == 2
    assert call("nonsense").exit_code == 2
    assert call("train", "--base", "b", "--task", "t", "--out", "o", "--lora-r", "many").exit_code == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("fingerprint", "no/such/dir"), "no/such/dir"),
        (("port", "nopatch/x/y", "--onto", "nobase", "--out", "out"), "nopatch/x/y"),
        (("prepare", "world_chess", "--out", "out"), "world_chess: no such task in the LM Evaluation Harness"),
        (("prepare", "world_boolq", "--out", "out", "--params", "none.yaml"), "none.yaml: cannot be read"),
        (("fetch", "world", "--out", "out"), "--corpus"),
        (("register", "nowhere", "--results", "none.json"), "none.json"),
    ],
)
def test_a_wrong_input_is_one_line_and_exit_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = call("--no-track", *words)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_verbose_twice_shows_where_an_error_came_from() -> None:
    done = call("-v", "-v", "fingerprint", "no/such/dir")
    assert done.exit_code == 1
    assert done.exception is not None
    assert not isinstance(done.exception, SystemExit)


def test_json_is_exactly_one_object_on_stdout(tmp_path: Path) -> None:
    done = call("prepare", "world_sst2", "--out", tmp_path / "d", "--train-rows", "20", "--test-rows", "40", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["rows"] == {"train": 20, "validation": 20, "test": 40}


def test_an_existing_out_is_refused_unless_forced(tmp_path: Path) -> None:
    words: tuple[Any, ...] = (
        "prepare",
        "world_sst2",
        "--out",
        tmp_path / "d",
        "--train-rows",
        "20",
        "--test-rows",
        "40",
    )
    assert call(*words).exit_code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    refused = call(*words)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert call(*words, "--force").exit_code == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("prepare: {train_rows: 24, test_rows: 40}\n", encoding="utf-8")
    done = call(
        "--no-track", "prepare", "world_sst2", "--out", tmp_path / "d", "--params", file, "--test-rows", "44", "--json"
    )
    assert json.loads(done.stdout)["rows"] == {"train": 24, "validation": 22, "test": 44}


def test_every_scalar_of_a_section_has_its_flag() -> None:
    flags = call("train", "--help").output
    for key in params.as_tree(params.TrainParams().optim):
        assert f"--{key.replace('_', '-')}" in flags
    for key in params.as_tree(params.TrainParams().lora):
        assert f"--lora-{key.replace('_', '-')}" in flags


def test_without_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 1.0, 6.0, 6.0, 7.0))
    monkeypatch.setattr("portllm.cli.running.time.monotonic", lambda: next(clock, 8.0))
    shown = running.Stage("port", running.Settings(), None)
    shown.bytes(1, 4_000_000_000)
    shown.bytes(1_000_000_000, 4_000_000_000)
    shown.bytes(2_000_000_000, 4_000_000_000)
    assert capsys.readouterr().err == "port: 1.00/4.00 GB (167 MB/s, 18 s left)\n"
    silent = running.Stage("port", running.Settings(quiet=True), None)
    silent.bytes(1, 2)
    assert capsys.readouterr().err == ""
