"""The paper's efficiency table: a patch by LoRA training, and by porting the one there is (arXiv:2410.10870).

    python benchmarks/efficiency.py --table efficiency.md

A model of Mistral-7B's exact shape with random weights is made on the spot where a CUDA GPU of 80 GB or more is at
hand; elsewhere one of the same proportions, every width and count divided by --scale. The rows are SST-2's, with the
prompts of the project's own task, in the tokens of a byte-pair vocabulary learnt from them (Mistral's own is not
needed for it). The patch is the paper's: r 8 on all linears, batch 4. Steps are timed and extrapolated to the paper's
10 epochs over all 67,349 rows; porting is run whole, by `portllm port`. Each figure is a process of its own, imports
included.

Rows come from PORTLLM_DATASETS/sst2/train.parquet, or from shared/datasets beside the project.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATASETS = Path(os.environ.get("PORTLLM_DATASETS", ROOT.parent / "shared" / "datasets"))
ROWS, EPOCHS, BATCH = 67349, 10, 4
PAPER_STEPS = -(-ROWS // BATCH) * EPOCHS
ENOUGH_BYTES = 79e9  # what drivers leave of 80 GB
DRIFT = 0.01  # of the release that is ported onto, relative to its weights


@dataclass(frozen=True)
class Cost:
    """One process of portllm: what it wrote into its cost file."""

    wall_seconds: float
    peak_rss_bytes: float
    train_seconds: float
    peak_cuda_bytes: float
    trainable_parameters: int
    useful_tokens_per_second: float
    cpu_utilisation: float


def main() -> None:
    """Make the model, its next release and the rows; train for a few steps, twice; port; print the table."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="portllm-efficiency-", dir=options.directory) as name:
        folder = Path(name)
        _rows(folder, options.rows)
        _in_its_own_process(folder, options.scale)
        # the difference of two runs is free of what every run does once
        short, long = (_train(folder, steps, options) for steps in (options.steps // 4, options.steps))
        step_seconds = (long.train_seconds - short.train_seconds) / (options.steps - options.steps // 4)
        ported = _port(folder)
        text = table(folder, options, long, step_seconds, ported)
    print(text)
    if options.table is not None:
        options.table.write_text(text + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scale", type=int, help="divide Mistral-7B's shape by this [default: 1 on 80 GB of GPU, else 4]"
    )
    parser.add_argument("--steps", type=int, default=40, help="steps of the longer timed run")
    parser.add_argument("--rows", type=int, default=2000, help="rows of SST-2 to draw the steps from")
    parser.add_argument("--directory", type=Path, help="where the temporary files go")
    parser.add_argument("--table", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.scale = options.scale or (1 if _gpu_bytes() >= ENOUGH_BYTES else 4)
    if options.make is not None:
        make_releases(options.make, options.scale)
        sys.exit()
    return options


def _gpu_bytes() -> int:
    from portllm.lm.sizing import equipment

    return max((gpu.memory_bytes for gpu in equipment.inspect(ROOT).gpus), default=0)


def _rows(folder: Path, count: int) -> None:
    """A sample of SST-2's training rows as DATA/sst2/train.parquet; a few of validation, which are not trained on."""
    import pyarrow.parquet as pq

    for split, rows in (("train", count), ("validation", 8)):
        source = DATASETS / "sst2" / f"{split}.parquet"
        if not source.is_file():
            sys.exit(f"{source} is not there; name the folder that holds sst2/ in PORTLLM_DATASETS")
        whole = pq.read_table(source)
        chosen = sorted(random.Random(0).sample(range(len(whole)), min(rows, len(whole))))
        (folder / "data" / "sst2").mkdir(parents=True, exist_ok=True)
        pq.write_table(whole.take(chosen), folder / "data" / "sst2" / f"{split}.parquet")


def _in_its_own_process(folder: Path, scale: int) -> None:
    # what building takes of memory must not stand in the figures of what comes after
    subprocess.run([sys.executable, __file__, "--make", str(folder), "--scale", str(scale)], check=True, cwd=ROOT)


def make_releases(folder: Path, scale: int) -> None:
    """folder/v0: Mistral-7B's shape divided by `scale`, random bf16 weights; folder/v1: the same a little moved."""
    import pyarrow.parquet as pq
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from portllm.lm.learning.words import byte_pairs
    from portllm.lm.quiet import quieten

    quieten()
    texts = pq.read_table(folder / "data" / "sst2" / "train.parquet", columns=["sentence"])["sentence"].to_pylist()
    tokenizer = byte_pairs(texts, 32000 // scale, 4096)
    heads = max(1, 32 // scale)
    config = MistralConfig(
        vocab_size=32000 // scale,
        hidden_size=128 * heads,
        intermediate_size=14336 * heads // 32,
        num_hidden_layers=max(1, 32 // scale),
        num_attention_heads=heads,
        num_key_value_heads=max(1, 8 // scale),
        head_dim=128,
        sliding_window=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = MistralForCausalLM(config)
    for release in ("v0", "v1"):
        model.save_pretrained(folder / release, max_shard_size="5GB")
        tokenizer.save_pretrained(folder / release)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std() * DRIFT)


def _train(folder: Path, steps: int, options: argparse.Namespace) -> Cost:
    words = ["train", "--base", folder / "v0", "--task", "sst2", "--data", folder / "data", "--out", folder / "patch"]
    words += ["--force", "--max-steps", steps, "--batch-size", BATCH, "--max-length", 256, "--learning-rate", "1e-4"]
    if options.scale == 1:
        words.append("--gradient-checkpointing")
    return _portllm(folder, words)


def _port(folder: Path) -> Cost:
    return _portllm(
        folder,
        ["port", folder / "patch", "--onto", folder / "v1", "--from", folder / "v0", "--out", folder / "ported"],
    )


def _portllm(folder: Path, words: list[Any]) -> Cost:
    """Run `portllm` and read its cost file."""
    file = folder / "cost.json"
    call = [sys.executable, "-m", "portllm", "--quiet", "--no-track", *map(str, words), "--cost", str(file)]
    done = subprocess.run(
        call, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"portllm {words[0]} failed: {done.stderr.strip()}")
    tree = json.loads(file.read_text(encoding="utf-8"))
    return Cost(**{key: tree.get(key, 0) for key in Cost.__dataclass_fields__})


def table(folder: Path, options: argparse.Namespace, trained: Cost, step_seconds: float, ported: Cost) -> str:
    """The table, and under it on what it was measured and how it was extrapolated."""
    from portllm.lm.sizing import equipment, models
    from portllm.params import FetchParams

    machine = equipment.inspect(ROOT)
    size_of_model = models.describe(str(folder / "v0"), FetchParams()).size
    parameters = size_of_model.parameters if size_of_model else 0
    device = machine.gpus[0].name if machine.gpus else f"{machine.cores} cores of {machine.cpu}, no GPU"
    hours = PAPER_STEPS * step_seconds / 3600
    size = (
        "Mistral-7B's shape" if options.scale == 1 else f"Mistral-7B's proportions at 1/{options.scale} of every width"
    )
    gpu = f"{trained.peak_cuda_bytes / 1e9:.2f} GB" if trained.peak_cuda_bytes else "no GPU"
    lines = [
        f"| {parameters / 1e6:,.0f} M parameters, {device} | LoRA training | porting |",
        "|---|---:|---:|",
        f"| trainable parameters | {trained.trainable_parameters:,} | 0 |",
        f"| peak memory, process | {trained.peak_rss_bytes / 1e9:.2f} GB | {ported.peak_rss_bytes / 1e9:.2f} GB |",
        f"| peak memory, GPU | {gpu} | none used |",
        f"| hours for 10 epochs of SST-2 | {hours:.2f} (extrapolated) | {ported.wall_seconds / 3600:.4f} (measured) |",
        "| *the paper, 7,242 M parameters: GPU memory, summed* | *350.61 GB* | *28.71 GB* |",
        "| *the paper: GPU-hours* | *40.65* | *0.0083* |",
        "",
        f"Random weights in {size}, bf16 on disk; {options.steps - options.steps // 4} steps of {BATCH} rows took "
        f"{step_seconds:.3f} s each ({trained.useful_tokens_per_second:,.0f} tokens/s without padding, "
        f"its threads {trained.cpu_utilisation:.0%} busy); the paper's "
        f"{EPOCHS} epochs over {ROWS:,} rows are {PAPER_STEPS:,} of them. The port took {ported.wall_seconds:.1f} s.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
