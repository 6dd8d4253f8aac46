"""How long `portllm port` takes beside `cp -r` and PEFT's merge-and-save, on random Llama-shaped checkpoints.

    python benchmarks/port.py --runs 3 --plot port.svg --table port.md

Every figure is a whole process, imports included: median wall time over the runs and the largest resident set. The
runs of the contestants alternate, so that a busy machine is unfair to none. The page cache is warm. `first` is a port
of a base whose fingerprint is not in the cache yet; `again` is every later port onto it. A port is on the disk when it
returns (fsync); `cp -r` is not, so the ratio to compare is the one to `cp -r; sync`. A bare `import torch` is measured,
too: PEFT needs it, a port of plain LoRA does not. PORTLLM_KERNEL=numpy measures a machine without a C compiler.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.algebra import kernel

HIDDEN, FEED_FORWARD, KEY_VALUE, VOCABULARY, RANK = 2048, 5632, 512, 32000, 8
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
TARGETS = {"all linears": list(LINEARS), "q,v": ["self_attn.q_proj", "self_attn.v_proj"]}

SIZES = [0.5, 1.0, 2.0, 4.0]  # gigabytes
PEFT = "PEFT merge and save"
SYNCED = "cp -r; sync"
FIRST, AGAIN = "portllm port (first)", "portllm port (again)"
# in the plot: label, colour, line, contestant, patch
LINES = (
    ("PEFT merge and save, all linears", "#b3432b", "-", PEFT, "all linears"),
    ("portllm port, all linears, first", "#1f5fa8", "-", FIRST, "all linears"),
    ("portllm port, all linears, again", "#1f5fa8", "--", AGAIN, "all linears"),
    ("portllm port, q and v, first", "#2a9d8f", "-", FIRST, "q,v"),
    ("portllm port, q and v, again", "#2a9d8f", "--", AGAIN, "q,v"),
    ("import torch alone", "#999999", ":", "import torch", "all linears"),
    ("cp -r; sync", "#555555", "--", SYNCED, "all linears"),
    ("cp -r (not synced)", "#555555", "-", "cp -r", "all linears"),
)

MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, patch, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, patch).merge_and_unload().save_pretrained(out)
"""


@dataclass(frozen=True)
class Cost:
    """One process: wall time and processor time in seconds, largest resident set in MiB."""

    seconds: float
    cpu_seconds: float
    mebibytes: float


@dataclass(frozen=True)
class Result:
    """What every contestant cost for one patch on a checkpoint of `nbytes`."""

    nbytes: int
    targets: str
    costs: dict[str, Cost]


def main() -> None:
    """Make each checkpoint, run the contestants in turn, print a table of each size; then the files asked for."""
    options = _options()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    setting = (
        f"{os.cpu_count()} CPUs, {versions}, sums {kernel.name()}, bf16, rank {RANK}, median of {options.runs} runs"
    )
    print(setting, flush=True)
    lines, results = [setting], []
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory(prefix="portllm-bench-", dir=options.directory) as folder:
            for result, table in _size(Path(folder), gigabytes, options):
                print(table, flush=True)
                lines.append(table)
                results.append(result)
    if options.table is not None:
        options.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(results, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=SIZES, help="checkpoint sizes, from 0.4 on")
    parser.add_argument("--runs", type=int, default=3, help="runs per contestant; the median is printed")
    parser.add_argument("--shard-gigabytes", type=float, default=0.5, help="largest shard")
    parser.add_argument("--targets", choices=TARGETS, nargs="+", default=list(TARGETS), help="what is patched")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out: it needs the whole model in memory")
    parser.add_argument("--directory", type=Path, default=None, help="where the temporary files go")
    parser.add_argument("--table", type=Path, default=None, help="also write the tables to this Markdown file")
    parser.add_argument("--plot", type=Path, default=None, help="draw time and memory over size to this file (.svg)")
    parser.add_argument("--json", type=Path, default=None, help="also append one JSON line per row to this file")
    return parser.parse_args()


def _size(folder: Path, gigabytes: float, options: argparse.Namespace) -> Iterator[tuple[Result, str]]:
    """(figures, Markdown table) of every patch on one checkpoint."""
    base = folder / "base"
    layers, nbytes = _apart(write_checkpoint, base, gigabytes, options.shard_gigabytes)
    files = len(list(base.glob("*.safetensors")))
    for targets in options.targets:
        patch = folder / "patch"
        _apart(write_patch, patch, layers, TARGETS[targets])
        result = Result(nbytes, targets, measure(folder, base, patch, options))
        if options.json is not None:
            _append(result, options.json)
        title = f"\n{nbytes / 1e9:.2f} GB in {files} files, {layers} layers, patch on {targets}:\n\n"
        yield result, title + _table(result)


def _table(result: Result) -> str:
    bare, copy, synced = (result.costs[name] for name in ("import torch", "cp -r", SYNCED))
    peft = result.costs.get(PEFT)
    lines = [
        f"| run | seconds | × {SYNCED} | × cp -r | without torch, × cp -r | PEFT takes | CPU seconds | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cost in result.costs.items():
        over = "" if name.startswith(("cp", "import")) else f"{(cost.seconds - bare.seconds) / copy.seconds:.2f}"
        times = f"{peft.seconds / cost.seconds:.1f} ×" if peft is not None else ""
        ratios = f"{cost.seconds / synced.seconds:.2f} | {cost.seconds / copy.seconds:.2f} | {over}"
        lines.append(
            f"| {name} | {cost.seconds:.2f} | {ratios} | {times} | {cost.cpu_seconds:.2f} | {cost.mebibytes:.0f} |"
        )
    return "\n".join(lines)


def _append(result: Result, file: Path) -> None:
    with file.open("a") as lines:
        for name, cost in result.costs.items():
            row = {"bytes": result.nbytes, "patch": result.targets, "run": name, **vars(cost)}
            lines.write(json.dumps(row) + "\n")


def plot(results: Sequence[Result], file: Path) -> None:
    """Draw seconds and peak memory over the checkpoint's size, a line for each contestant."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "svg.hashsalt": "portllm", "svg.fonttype": "none"})
    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for label, colour, style, name, targets in LINES:
        found = [r for r in results if r.targets == targets and name in r.costs]
        sizes = [r.nbytes / 1e9 for r in found]
        look = {"color": colour, "linestyle": style, "marker": "o", "linewidth": 2, "markersize": 5}
        if found:
            time_axes.plot(sizes, [r.costs[name].seconds for r in found], label=label, **look)
        if found and not name.startswith("cp"):
            memory_axes.plot(sizes, [r.costs[name].mebibytes for r in found], label=label, **look)
    time_axes.set(title="Wall time of the whole command", ylabel="seconds")
    memory_axes.set(title="Largest resident memory", ylabel="MiB")
    for axes in (time_axes, memory_axes):
        axes.set(xlabel="checkpoint, GB")
        axes.set_xlim(left=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(visible=True, which="both", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = time_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _apart(function: Callable[..., Any], *arguments: object) -> Any:
    # a child's largest resident set counts what its parent held when it forked, so this process stays small
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(folder: Path, base: Path, patch: Path, options: argparse.Namespace) -> dict[str, Cost]:
    """Median time and largest memory of every contestant, their runs alternating."""
    out, cache = folder / "out", folder / "cache"
    python = [sys.executable, "-c"]
    port = [sys.executable, "-m", "portllm", "-q", "port", str(patch), "--onto", str(base), "--out", str(out)]
    commands = {"import torch": [*python, "import torch"], "cp -r": ["cp", "-r", str(base), str(out)]}
    commands[SYNCED] = ["sh", "-c", f"cp -r {base} {out} && sync"]
    commands |= {FIRST: port, AGAIN: port}
    if not options.no_peft:
        commands[PEFT] = [*python, MERGE, str(base), str(patch), str(out)]
    found: dict[str, list[Cost]] = {name: [] for name in commands}
    time.sleep(2.1)  # a file younger than two seconds is not kept in the fingerprint cache
    for _ in range(options.runs):
        for name, command in commands.items():
            if name == FIRST:
                shutil.rmtree(cache, ignore_errors=True)
            found[name].append(timed(command, cache))
            shutil.rmtree(out, ignore_errors=True)
    return {
        name: Cost(
            statistics.median(c.seconds for c in runs),
            statistics.median(c.cpu_seconds for c in runs),
            max(c.mebibytes for c in runs),
        )
        for name, runs in found.items()
    }


def timed(command: list[str], cache: Path) -> Cost:
    """Run one process to its end. Raises RuntimeError with its last words when it fails."""
    os.sync()  # what the run before left to be written is not this one's cost
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as words:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=words, stderr=words, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            words.seek(0)
            raise RuntimeError(f"{command[:4]} failed: {words.read()[-2000:].decode(errors='replace')}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def write_checkpoint(folder: Path, gigabytes: float, shard_gigabytes: float) -> tuple[int, int]:
    """A random bf16 Llama of about that size, sharded as the hub does; returns (layers, bytes)."""
    per_layer = 2 * sum(rows * columns for rows, columns in LINEARS.values())
    embeddings = 2 * 2 * VOCABULARY * HIDDEN
    layers = max(1, round((gigabytes * 1e9 - embeddings) / per_layer))
    folder.mkdir()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_gigabytes * 1e9
    for name, shape in _tensors(layers):
        nbytes = 2 * math.prod(shape)
        if nbytes > room and shards[-1]:
            shards.append({})
            room = shard_gigabytes * 1e9
        shards[-1][name] = shape
        room -= nbytes
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(files) == 1:
        files = ["model.safetensors"]
    total = sum(_write_file(folder / file, shard) for file, shard in zip(files, shards, strict=True))
    if len(files) > 1:
        names = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(layers)))
    return layers, total


def write_patch(folder: Path, layers: int, modules: list[str]) -> None:
    """A random fp32 LoRA patch on `modules` of every layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for module in modules:
            rows, columns = LINEARS[module]
            name = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{name}.lora_A.weight"], shapes[f"{name}.lora_B.weight"] = (RANK, columns), (rows, RANK)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _write_file(folder / "adapter_model.safetensors", shapes, "F32")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": sorted({m.rpartition(".")[2] for m in modules}), "base_model_name_or_path": "old-base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        for module, shape in LINEARS.items():
            yield f"model.layers.{layer}.{module}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], code: str = "BF16") -> int:
    import torch

    dtype = torch.bfloat16 if code == "BF16" else torch.float32
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        stop = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data
    torch.manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            values = torch.randn(shape).mul_(0.02).to(dtype)
            file.write(values.view(torch.uint8).numpy().data)
    return at


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "dtype": "bfloat16",
        "intermediate_size": FEED_FORWARD, "num_hidden_layers": layers, "num_attention_heads": HIDDEN // 64,
        "num_key_value_heads": KEY_VALUE // 64, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip


if __name__ == "__main__":
    main()
