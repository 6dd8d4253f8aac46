"""Training on real rows: SST-2 with the model that writes stories. What is padded, grouped, or killed changes nothing.

Data and model lie outside the project; where they are absent these tests are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from portllm.lm.data import encoding, tasks
from portllm.lm.learning import loading, training
from portllm.lm.learning.batches import GlobalBatches
from portllm.params import LoraParams, OptimParams

ROOT = Path(__file__).parents[2]
DATASETS = Path(os.environ.get("PORTLLM_DATASETS", ROOT.parent / "shared" / "datasets"))
STORIES, SST2 = DATASETS / "stories260k", DATASETS / "sst2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (STORIES.is_dir() and SST2.is_dir()), reason="needs stories260k and sst2; see PORTLLM_DATASETS"
    ),
]
ROWS, STEPS = 200, 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of SST-2 as `prepare` leaves them."""
    root = tmp_path_factory.mktemp("data")
    (root / "sst2").mkdir()
    pq.write_table(pq.read_table(SST2 / "train.parquet").slice(0, ROWS), root / "sst2" / "train.parquet")
    return root


def test_the_loss_is_that_of_the_plain_loop_over_padded_rows(data: Path) -> None:
    """Every row padded to 256 with its attention mask, AdamW by hand: the recipe this project began with."""
    optim = OptimParams(learning_rate=1e-3, max_steps=STEPS, schedule="constant", logging_steps=1, threads=1)
    tokenizer = loading.tokenizer_of(STORIES)
    pairs = tasks.training_pairs("sst2", data, tokenizer)
    examples = encoding.encode(tokenizer, pairs, 256).examples
    assert len(examples) == ROWS
    model = loading.add_lora(loading.frozen_base(STORIES, optim), LoraParams(dropout=0.0), seed=0)
    fitted = training.fit(model, tokenizer, examples, optim=optim, seed=0)
    plain = _plain_loop(
        loading.add_lora(loading.frozen_base(STORIES, optim), LoraParams(dropout=0.0), seed=0), examples, optim
    )
    assert [row["loss"] for row in fitted.history] == pytest.approx(plain, rel=1e-4)
    assert fitted.cost["useful_tokens_per_second"] < fitted.cost["tokens_per_second"]


def _plain_loop(model: Any, examples: Any, optim: OptimParams) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses = []
    for rows in list(GlobalBatches(len(examples), optim.batch_size, 0))[:STEPS]:
        chosen = [examples[row] for row in rows]
        ids, labels = (
            torch.tensor([row[key] + [fill] * (256 - len(row[key])) for row in chosen])
            for key, fill in (("input_ids", 0), ("labels", -100))
        )
        mask = torch.tensor([[1] * len(row["labels"]) + [0] * (256 - len(row["labels"])) for row in chosen])
        loss = model.train()(input_ids=ids, labels=labels, attention_mask=mask).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_killed_and_run_again_from_the_command_line_it_is_the_same_patch(data: Path, tmp_path: Path) -> None:
    running = _train(data, tmp_path / "whole")
    _, notes = running.communicate()
    assert running.returncode == 0, notes
    for moment in (1, 3):
        running = _train(data, tmp_path / "killed")
        _wait_for(tmp_path, moment, running)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        assert not (tmp_path / "killed").exists()
    running = _train(data, tmp_path / "killed")
    _, notes = running.communicate()
    assert running.returncode == 0, notes
    assert "going on after step" in notes
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"killed", "whole", "whole.json", "killed.json"}
    cost = json.loads((tmp_path / "killed.json").read_text())
    assert cost["useful_tokens_per_second"] > 0


def _train(data: Path, out: Path) -> subprocess.Popen[str]:
    words = "--max-steps 60 --batch-size 4 --logging-steps 7 --save-steps 5 --group-by-length --threads 1 --task sst2"
    paths = ["--base", str(STORIES), "--data", str(data), "--out", str(out), "--cost", f"{out}.json"]
    call = [sys.executable, "-m", "portllm", "--no-track", "train", *paths, *words.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    # not in the project, whose commit stands in the record
    return subprocess.Popen(call, cwd=data, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env)


def _wait_for(folder: Path, snapshots: int, running: subprocess.Popen[str]) -> None:
    """Until that many more snapshots were written, or the training ended."""
    seen: set[str] = {path.name for path in folder.glob(".killed.kept/*/0*")}
    wanted = len(seen) + snapshots
    while len(seen) < wanted:
        assert running.poll() is None, "it ended before it was killed"
        seen |= {path.name for path in folder.glob(".killed.kept/*/0*")}
        time.sleep(0.01)


def _files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
