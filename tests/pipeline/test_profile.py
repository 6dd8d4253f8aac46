"""A profile of real tasks and models runs all of the same dvc.yaml by the one documented command, next to the world's.

The profile is as small as one can be: a random Llama in a directory, one task of eight rows, answered by generating,
and one update by merged LoRA.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.pipeline, pytest.mark.slow]

PROFILE = """
tasks: [gsm8k]
releases: [v0, alpaca]
prepare: {data: data/local, corpora: {alpaca: {source: alpaca, test_rows: 8}}}
fetch: {source: ../../model}
evolve:
  mode: lora
  seed: 1
  block_length: 16
  optim: {learning_rate: 1e-3, max_steps: 2, batch_size: 2, threads: 1}
  lora: {r: 4, alpha: 8}
  releases: {alpaca: {base: v0}}
train:
  lora: {r: 2, alpha: 4}
  optim: {learning_rate: 1e-3, max_steps: 2, batch_size: 2, threads: 1}
port: {as: adapter, method: direct, scale: 1.0}
evaluate: {num_fewshot: 0, batch_size: 8, limit: 4, threads: 1}
report: {bootstrap_samples: 50}
register: {name: "tiny-{task}"}
"""
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 300,
}  # fmt: skip
ADJECTIVES = ("good", "bad", "fine", "poor", "warm", "cold", "glad", "grim")


@pytest.fixture
def tiny(project: Callable[..., Any]) -> Any:
    """A copy of the project with a profile, and the config alone of the model it names."""
    one = project()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, one.folder / name)
    shutil.copytree(ROOT / ".dvc" / "plots", one.folder / ".dvc" / "plots")
    # a tree without git, as an exported archive is (issue 8, item 10): make must set what DVC needs, in the workspace
    (one.folder / ".git").rmdir()
    shutil.copy(ROOT / ".dvc" / "config", one.folder / ".dvc" / "config")
    for name in ("portllm", "dvc"):  # what the Makefile takes from .venv
        (one.folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        (one.folder / ".venv" / "bin" / name).symlink_to(Path(sys.executable).parent / name)
    (one.folder / "profiles").mkdir()
    (one.folder / "profiles" / "tiny.yaml").write_text(PROFILE, encoding="utf-8")
    (one.folder / "model").mkdir()
    (one.folder / "model" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    return one


def write_data(folder: Path) -> None:
    """Rows in the hub's columns."""
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k/train": [{"question": f"What is {i} and 2?", "answer": f"Add.\n#### {i + 2}"} for i in range(8)],
        "gsm8k/test": [{"question": f"What is {i} and 3?", "answer": f"Add.\n#### {i + 3}"} for i in range(8)],
        "alpaca/train": [
            {"instruction": f"Say how a {w} day is, and why, at length.", "input": "", "output": f"It is {w}. " * 8}
            for w in (a + b for a in ADJECTIVES for b in ADJECTIVES)
        ],
    }
    for name, split in rows.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in split), encoding="utf-8")


def write_model(folder: Path, data: Path) -> None:
    """A Llama of two small layers with random weights, and a byte-pair tokenizer of the data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from portllm.lm.learning.words import byte_pairs

    tokenizer = byte_pairs([file.read_text(encoding="utf-8") for file in sorted(data.rglob("*.jsonl"))], 300, 512)
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**{**LLAMA, **special, "vocab_size": len(tokenizer)})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make(one: Any, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `make …` in the copy with nothing to set up and no variables of the make that runs the tests."""
    env = {name: value for name, value in one.env.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    return subprocess.run(
        ["make", "-o", ".venv/.ready", *words], cwd=one.folder, env=env, capture_output=True, text=True, check=False
    )


def test_one_command_runs_all_of_a_profile_and_leaves_the_project_alone(tiny: Any, forked: Path) -> None:
    command = tiny.folder / ".venv" / "bin" / "portllm"
    command.unlink()
    command.symlink_to(forked / "portllm")
    write_data(tiny.folder / "data" / "local")
    write_model(tiny.folder / "model", tiny.folder / "data" / "local")
    before = {name: (tiny.folder / name).read_bytes() for name in ("params.yaml", "dvc.yaml")}
    done = make(tiny, "repro", "PROFILE=tiny")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "This machine can run the experiment." in done.stdout

    there = tiny.folder / "workspaces" / "tiny"
    ported = there / "models" / "ported" / "alpaca" / "gsm8k"
    assert (ported / "adapter_model.safetensors").is_file()
    scores = json.loads((there / "results" / "evaluate" / "alpaca.json").read_text())
    arms = {(row["task"], row["arm"]) for row in scores["results"]}
    assert {("gsm8k", arm) for arm in ("base", "ported", "tuned")} <= arms
    metrics = json.loads((there / "results" / "metrics.json").read_text())
    assert set(metrics) == {"v0", "alpaca"}
    assert {"ported", "retuned", "base"} <= set(metrics["alpaca"]["gsm8k"])
    text = (there / "results" / "report" / "report.md").read_text()
    assert "exact_match,flexible-extract" in text
    assert "no probe was recorded" in text
    assert "patch gives the answers it gave before (1 of 1 tasks)" in text
    decided = json.loads((there / "results" / "register" / "alpaca.json").read_text())
    assert {one["task"] for one in decided["decisions"]} == {"gsm8k"}

    assert {name: (tiny.folder / name).read_bytes() for name in before} == before
    assert not (tiny.folder / "dvc.lock").exists()
    assert not (tiny.folder / "models").exists()
    assert (there / "dvc.yaml").resolve() == (tiny.folder / "dvc.yaml").resolve()

    again = make(tiny, "repro", "PROFILE=tiny")
    assert again.returncode == 0
    assert "Running stage" not in again.stdout


def test_params_edited_in_a_workspace_stay_and_the_profile_does_too(tiny: Any) -> None:
    assert make(tiny, "workspace", "PROFILE=tiny").stdout == ""
    profile, there = tiny.folder / "profiles" / "tiny.yaml", tiny.folder / "workspaces" / "tiny" / "params.yaml"
    assert there.read_text() == PROFILE
    there.write_text(PROFILE.replace("seed: 1", "seed: 2"))
    again = make(tiny, "workspace", "PROFILE=tiny")
    assert "note: workspaces/tiny/params.yaml is not profiles/tiny.yaml" in again.stdout
    assert "seed: 2" in there.read_text()
    assert profile.read_text() == PROFILE
    there.unlink()
    there.symlink_to(profile)
    assert make(tiny, "workspace", "PROFILE=tiny").stdout == ""
    assert not there.is_symlink()


def test_what_cannot_run_stops_before_anything_does(tiny: Any) -> None:
    absent = make(tiny, "repro", "PROFILE=large")
    assert absent.returncode != 0
    assert "profiles/large.yaml is not there; expected PROFILE=one of: tiny" in absent.stdout + absent.stderr
    assert not (tiny.folder / "workspaces").exists()

    (tiny.folder / "model" / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 2 * 10**9}))
    large = make(tiny, "repro", "PROFILE=tiny")
    assert large.returncode != 0
    assert "FAIL" in large.stdout
    assert "Running stage" not in large.stdout
    assert os.listdir(tiny.folder / "workspaces" / "tiny" / "data") == ["local"]
