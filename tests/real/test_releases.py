"""Releases of real text, by the commands alone: a base from scratch on what `prepare` makes of alpaca, and the next."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.cli import main

DATASETS = Path(os.environ.get("PORTLLM_DATASETS", Path(__file__).parents[3] / "shared" / "datasets"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # transformers and peft warn of each other
    pytest.mark.skipif(
        not (DATASETS / "alpaca").is_dir(), reason="needs alpaca: name the folder of datasets in PORTLLM_DATASETS"
    ),
]

PARAMS = """
prepare:
  data: {data}
  corpora:
    v0: {{source: alpaca, rows: 1500, test_rows: 20}}
    v1: {{source: alpaca_gpt4_sample, test_rows: 20}}
fetch:
  source: scratch
  vocab_size: 800
  block_length: 64
  architecture: {{hidden_size: 32, intermediate_size: 64, layers: 2, heads: 4, kv_heads: 2, tie_word_embeddings: true}}
  optim: {{learning_rate: 5e-3, max_steps: 60, batch_size: 8, logging_steps: 10, threads: 1}}
evolve:
  block_length: 64
  lora: {{r: 8, alpha: 16, dropout: 0.0}}
  optim: {{learning_rate: 5e-3, max_steps: 60, batch_size: 8, logging_steps: 10, threads: 1}}
  releases: {{v1: {{base: v0}}}}
"""


def call(*words: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["--no-track", *map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def loss(model: Path, corpus: Path) -> float:
    """Mean over the corpus's test texts, of 64 tokens each at most."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    losses = []
    with torch.no_grad():
        for text in pq.read_table(corpus / "test.parquet").column("text").to_pylist():
            ids = tokenizer(text, return_tensors="pt").input_ids[:, :64]
            losses.append(lm(ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def test_a_base_from_scratch_and_its_next_release_read_real_text(tmp_path: Path) -> None:
    settings = tmp_path / "params.yaml"
    settings.write_text(PARAMS.format(data=DATASETS))
    shared = ("--params", settings)
    for release in ("v0", "v1"):
        call("prepare", f"corpus_{release}", *shared, "--out", tmp_path / "corpora" / release)
    rows = {r: json.loads((tmp_path / "corpora" / r / "dataset.json").read_text())["rows"] for r in ("v0", "v1")}

    v0 = call("fetch", *shared, "--corpus", tmp_path / "corpora" / "v0", "--out", tmp_path / "v0")
    assert v0["metrics"]["documents"] == rows["v0"]["train"]
    assert v0["metrics"]["loss"] < 6.0, "an even guess over 800 tokens is ln 800 = 6.7"

    step = ("--base", tmp_path / "v0", "--corpus", tmp_path / "corpora" / "v1", "--release", "v1")
    losses: dict[str, float] = {}
    for mode in ("lora", "full"):
        out = tmp_path / f"v1-{mode}"
        record = call("evolve", *shared, *step, "--mode", mode, "--out", out)
        assert record["metrics"]["documents"] == rows["v1"]["train"]
        assert record["base"]["fingerprint"] == v0["fingerprint"]
        assert Checkpoint.open(out).names == Checkpoint.open(tmp_path / "v0").names
        losses[mode] = loss(out, tmp_path / "corpora" / "v1")
    before = loss(tmp_path / "v0", tmp_path / "corpora" / "v1")
    assert losses["full"] < losses["lora"] < before, "both know more of v1's text, which neither has read, than v0"
