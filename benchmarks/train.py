"""Tokens per second and peak memory of LoRA training: portllm's recipe beside the seed recipe, on real SST-2 rows.

    python benchmarks/train.py --steps 200 --runs 3 --plot train.svg --table train.md
    python benchmarks/train.py --model models/releases/v0 --precision bf16     # on a GPU, a base of your own

The seed recipe is the plain loop this project began with: every row padded to 256 tokens, batches of 4, torch's AdamW.
portllm's pads each batch to its longest row; `grouped` also brings rows of like length together. All train the same
LoRA on the same rows in the same precision; the first two on the same batches in the same order, without dropout, so
that their losses must be equal to rounding; grouped batches are others, so that only the mean can be compared.

Each figure is a process of its own. Tokens are counted without padding, seconds without imports and loading; memory is
the process's highest, imports included. Contestants alternate, the median of the runs is shown. Models: a Llama made on
the spot with a byte-pair vocabulary of the rows, and the Llama of 260 thousand parameters that writes stories.

Rows come from PORTLLM_DATASETS/sst2/train.parquet, or from shared/datasets beside the project.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATASETS = Path(os.environ.get("PORTLLM_DATASETS", ROOT.parent / "shared" / "datasets"))
LENGTH, BATCH = 256, 4
SEED, OURS, GROUPED = "seed recipe", "portllm", "portllm, grouped"
COLOURS = {SEED: "#b3432b", OURS: "#1f5fa8", GROUPED: "#2a9d8f"}


def main() -> None:
    """Make model and rows, let the contestants train in turn, print the table."""
    options = _options()
    if options.child:
        print(json.dumps(train(options)))
        return
    with tempfile.TemporaryDirectory(prefix="portllm-train-", dir=options.directory) as name:
        folder = Path(name)
        _rows(folder, options.rows)
        models = _models(folder, options)
        results = {label: contest(folder, model, options) for label, model in models.items()}
    text = "\n\n".join(table(label, runs, options) for label, runs in results.items())
    print(text)
    if options.table is not None:
        options.table.write_text(text + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(results, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000, help="rows of SST-2 to draw from")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of both recipes")
    parser.add_argument("--model", type=Path, help="a base of your own instead of the two small ones")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model made on the spot")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model made on the spot")
    parser.add_argument("--directory", type=Path, help="where the temporary files go")
    parser.add_argument("--plot", type=Path, help="draw the loss by seconds into this file")
    parser.add_argument("--table", type=Path, help="also write the tables to this Markdown file")
    parser.add_argument("--child", choices=[SEED, OURS, GROUPED], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _rows(folder: Path, count: int) -> None:
    """A sample of SST-2's training rows as DATA/sst2/train.parquet."""
    import pyarrow.parquet as pq

    source = DATASETS / "sst2" / "train.parquet"
    if not source.is_file():
        sys.exit(f"{source} is not there; name the folder that holds sst2/ in PORTLLM_DATASETS")
    whole = pq.read_table(source)
    chosen = sorted(random.Random(0).sample(range(len(whole)), min(count, len(whole))))
    (folder / "data" / "sst2").mkdir(parents=True)
    pq.write_table(whole.take(chosen), folder / "data" / "sst2" / "train.parquet")


def _models(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Label → base to train on."""
    if options.model is not None:
        return {options.model.name: options.model.resolve()}
    found = {f"{_made(folder / 'base', options) / 1e6:.1f} M parameters made on the spot": folder / "base"}
    stories = DATASETS / "stories260k"
    return {**found, "stories260k": stories} if stories.is_dir() else found


def _made(folder: Path, options: argparse.Namespace) -> int:
    """Write a Llama with random weights and a byte-pair vocabulary of the rows; its number of parameters."""
    import pyarrow.parquet as pq

    from portllm.lm.learning.llama import new_llama
    from portllm.lm.learning.words import byte_pairs
    from portllm.lm.quiet import quieten
    from portllm.params import ArchitectureParams

    quieten()
    rows = pq.read_table(folder.parent / "data" / "sst2" / "train.parquet", columns=["sentence"])
    tokenizer = byte_pairs(rows["sentence"].to_pylist(), 4096, LENGTH)
    shape = ArchitectureParams(
        hidden_size=options.hidden, intermediate_size=4 * options.hidden, layers=options.layers,
        heads=options.hidden // 64, initializer_range=0.02,
    )  # fmt: skip
    model = new_llama(tokenizer, shape, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def contest(folder: Path, model: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Each contestant's runs on one model, in turns."""
    runs: dict[str, list[dict[str, Any]]] = {SEED: [], OURS: [], GROUPED: []}
    for _ in range(options.runs):
        for who, made in runs.items():
            call = [sys.executable, __file__, "--child", who, "--model", str(model), "--folder", str(folder)]
            for name in ("steps", "threads", "precision"):
                call += [f"--{name}", str(getattr(options, name))]
            env = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(call, capture_output=True, text=True, check=False, env=env, cwd=ROOT)
            if done.returncode:
                sys.exit(f"{who} failed: {done.stderr.strip()}")
            made.append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One contestant's run in this process: useful tokens, seconds, memory, losses with the second they came at."""
    import torch

    from portllm.lm.data import encoding, tasks
    from portllm.lm.learning import loading, machine, training
    from portllm.lm.quiet import quieten
    from portllm.params import LoraParams, OptimParams

    quieten()
    torch.set_num_threads(options.threads)
    tokenizer = loading.tokenizer_of(options.model)
    pairs = tasks.training_pairs("sst2", options.folder / "data", tokenizer)
    examples = encoding.encode(tokenizer, pairs, LENGTH).examples
    optim = OptimParams(
        learning_rate=1e-3, max_steps=options.steps, batch_size=BATCH, schedule="constant", logging_steps=1,
        precision=options.precision, threads=options.threads, group_by_length=options.child == GROUPED,
    )  # fmt: skip
    base = loading.frozen_base(options.model, optim)
    model = loading.add_lora(base, LoraParams(dropout=0.0), seed=0)
    pad = tokenizer.pad_token_id or 0
    started_at = time.perf_counter()
    seconds: list[float] = []
    if options.child == SEED:
        losses, useful = _plain_loop(model, examples, pad, optim, seconds)
    else:
        done = training.fit(
            model, tokenizer, examples, optim=optim, seed=0,
            on_metrics=lambda *_: seconds.append(time.perf_counter() - started_at),
        )  # fmt: skip
        losses = [row["loss"] for row in done.history]
        useful = round(done.cost["useful_tokens_per_second"] * done.cost["train_seconds"])
    took = seconds[-1]
    peak_cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    memory = {"peak_rss_bytes": machine.peak_rss_bytes(), "peak_cuda_bytes": peak_cuda}
    return {"useful": useful, "seconds": took, "losses": losses, "at": seconds, **memory}


def _plain_loop(model: Any, examples: Any, pad: int, optim: Any, seconds: list[float]) -> tuple[list[float], int]:
    """The seed recipe: every row to 256 tokens with its attention mask; losses and useful tokens."""
    import torch

    from portllm.lm.learning.batches import GlobalBatches

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=optim.learning_rate, weight_decay=optim.weight_decay
    )
    autocast = torch.autocast(device, dtype=torch.bfloat16) if optim.precision == "bf16" else contextlib.nullcontext()
    batches = GlobalBatches(len(examples), BATCH, 0)
    losses, useful, epoch = [], 0, 0
    started_at = time.perf_counter()
    while len(losses) < optim.max_steps:
        batches.set_epoch(epoch)
        for rows in batches:
            chosen = [examples[row] for row in rows]
            batch = {
                key: torch.tensor([row[name] + [fill] * (LENGTH - len(row[name])) for row in chosen], device=device)
                for key, name, fill in (("input_ids", "input_ids", pad), ("labels", "labels", -100))
            }
            lengths = torch.tensor([[len(row["input_ids"])] for row in chosen], device=device)
            batch["attention_mask"] = (torch.arange(LENGTH, device=device) < lengths).long()
            with autocast:
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - started_at)
            useful += int(lengths.sum())
            if len(losses) == optim.max_steps:
                break
        epoch += 1
    return losses, useful


def table(label: str, runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """The contestants side by side, and how far their losses are apart."""
    lines = [
        f"| {label} | useful tokens/s | steps/s | peak memory | mean loss of the last half |",
        "|---|---:|---:|---:|---:|",
    ]
    speeds = {who: statistics.median(run["useful"] / run["seconds"] for run in made) for who, made in runs.items()}
    for who, made in runs.items():
        steps = statistics.median(options.steps / run["seconds"] for run in made)
        gpu = max(run["peak_cuda_bytes"] for run in made)
        peak = gpu or statistics.median(run["peak_rss_bytes"] for run in made)
        last = statistics.fmean(made[0]["losses"][options.steps // 2 :])
        lines.append(
            f"| {who} | {speeds[who]:,.0f} ({speeds[who] / speeds[SEED]:.1f}×) | {steps:.1f} "
            f"| {peak / 1e6:,.0f} MB | {last:.4f} |"
        )
    seed, ours = runs[SEED][0]["losses"], runs[OURS][0]["losses"]
    apart = max(abs(a - b) for a, b in zip(seed, ours, strict=True))
    spread = statistics.stdev(seed[options.steps // 2 :])
    lines += [
        "",
        f"{options.steps} steps of {BATCH} rows, {options.precision}, {options.threads} threads, median of "
        f"{options.runs}. The losses of seed recipe and portllm differ by {apart:.1e} at most over the steps (from one "
        f"batch to the next they vary by {spread:.2f}).",
    ]
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Loss (mean of ten steps) by seconds of training, one panel a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(4.6 * len(results), 3.2), squeeze=False)
    for panel, (label, runs) in zip(panels[0], results.items(), strict=True):
        for who, made in runs.items():
            run = made[0]
            ends = range(10, len(run["losses"]) + 1, 10)
            losses = [statistics.fmean(run["losses"][end - 10 : end]) for end in ends]
            panel.plot([run["at"][end - 1] for end in ends], losses, color=COLOURS[who], label=who)
        panel.set(title=label, xlabel="seconds of training", ylabel="loss", ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
