"""The paper's seven tasks on a base and three patches: one `portllm evaluate` against an `lm_eval` call per cell.

    python benchmarks/evaluate.py --limit 40 --plot evaluate.svg --table evaluate.md
    python benchmarks/evaluate.py --model models/my-base --tasks sst2 gsm8k --limit 0

Both score the same rows of the same files (what `portllm prepare` writes) with the same examples in the prompt and the
same batch size, and every metric must be equal to the last digit, or this fails. A figure is a whole process, imports
included; portllm's caches are empty at first, `again` is the same call once more.

`lm_eval` also estimates the error of F1 by 100,000 resamplings, which no option switches off and which takes minutes;
that is left out here (`--errors` leaves it in). Patches are random LoRAs of all linears. The model is a Llama of 260
thousand parameters that writes stories, so that what is compared is all but the model's own arithmetic; it and the rows
come from PORTLLM_DATASETS, or from shared/datasets next to the project.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATASETS = Path(os.environ.get("PORTLLM_DATASETS", ROOT.parent / "shared" / "datasets"))
TASKS = {
    "boolq": "super_glue/boolq/default.yaml", "sst2": "glue/sst2/default.yaml", "mrpc": "glue/mrpc/default.yaml",
    "rte": "glue/rte/default.yaml", "wnli": "glue/wnli/default.yaml", "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS, AGAIN, THEIRS = "portllm evaluate", "portllm evaluate, again", "lm_eval, once a cell"
WITHOUT_ERRORS = "import lm_eval.evaluator_utils as u; u.stderr_for_metric = lambda **_: None; "
HARNESS = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
Metrics = Mapping[tuple[str, str], Mapping[str, float]]  # by patch ("" for none) and task


@dataclass(frozen=True)
class Cost:
    """One or more processes: wall and processor seconds."""

    seconds: float
    cpu_seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


def main() -> None:
    """Make data and patches, run both, compare their figures, print a table, and write it where an option says so."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="portllm-bench-") as folder:
        root = Path(folder)
        patches = _apart(_make, root, options)
        first, ours = portllm(root, patches, options)
        again, cached = portllm(root, patches, options)
        if cached != ours:
            sys.exit("portllm's own figures differ when they come from the cache")
        cells = {}
        for patch in ("", *patches):
            for task in options.tasks:
                cost, metrics = lm_eval(root, patch, task, options)
                cells[patch, task] = cost
                _compare(ours[patch, task], metrics, f"{task} on {patch or 'the base'}")
                print(f"{len(cells)}/{len(ours)} {task} {patch or 'base'}: {cost.seconds:.1f} s", flush=True)
    text = table(first, again, cells, options)
    print(text)
    if options.table is not None:
        options.table.write_text(text + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(first, again, cells, options.plot)


def portllm(root: Path, patches: Sequence[str], options: argparse.Namespace) -> tuple[Cost, Metrics]:
    """Return what one `portllm evaluate` costs for all cells, and its metrics."""
    out = root / "ours.json"
    words = ["--no-track", "-q", "evaluate", str(options.model), "--tasks", ",".join(options.tasks)]
    words += ["--data", str(root / "data"), "--out", str(out), "--limit", str(options.limit)]
    words += ["--num-fewshot", str(options.num_fewshot), "--batch-size", str(options.batch_size)]
    words += [word for patch in patches for word in ("--patch", str(root / patch))]
    cost = _run([sys.executable, "-m", "portllm", *words], root)
    rows = json.loads(out.read_text(encoding="utf-8"))["results"]
    return cost, {(row["patch"] or "", row["task"]): row["metrics"] for row in rows}


def lm_eval(root: Path, patch: str, task: str, options: argparse.Namespace) -> tuple[Cost, Mapping[str, float]]:
    """Return what one `lm_eval` call costs for one cell, and its metrics."""
    out = root / "theirs" / f"{patch}-{task}"
    model = f"pretrained={options.model}" + (f",peft={root / patch}" if patch else "")
    words = ["run", "--model", "hf", "--model_args", model, "--tasks", str(root / "tasks" / f"{task}.yaml")]
    words += ["--num_fewshot", str(options.num_fewshot), "--batch_size", str(options.batch_size)]
    words += ["--limit", str(options.limit)] if options.limit else []
    code = HARNESS if options.errors else WITHOUT_ERRORS + HARNESS
    command = [sys.executable, "-W", "ignore", "-c", code, *words, "--log_samples", "--output_path", str(out)]
    cost = _run(command, root)
    (file,) = out.rglob("results_*.json")
    row = json.loads(file.read_text(encoding="utf-8"))["results"][task]
    metrics = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "sample_len" and "_stderr" not in k}
    return cost, metrics


def table(first: Cost, again: Cost, cells: Mapping[tuple[str, str], Cost], options: argparse.Namespace) -> str:
    """Return the figures as Markdown."""
    total = sum(cells.values(), Cost(0, 0))
    names = ("lm-eval", "torch", "transformers", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    rows = f"{options.limit} rows a task" if options.limit else "all rows"
    lines = [
        f"{len(cells)} cells, {rows}, batches of {options.batch_size}, {os.cpu_count()} CPUs, {versions}; "
        f"every metric of every cell is equal",
        "",
        "| run | processes | seconds | CPU seconds | lm_eval takes |",
        "|---|---|---|---|---|",
        f"| {THEIRS} | {len(cells)} | {total.seconds:.1f} | {total.cpu_seconds:.1f} | |",
    ]
    for name, cost in ((OURS, first), (AGAIN, again)):
        times = f"{total.seconds / cost.seconds:.1f} ×"
        lines.append(f"| {name} | 1 | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} | {times} |")
    return "\n".join(lines)


def plot(first: Cost, again: Cost, cells: Mapping[tuple[str, str], Cost], file: Path) -> None:
    """Draw a bar for each run; that of lm_eval in parts, one for each task."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "svg.hashsalt": "portllm", "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(figsize=(9, 2.6), layout="constrained")
    start = 0.0
    for i, task in enumerate(dict.fromkeys(task for _, task in cells)):
        seconds = sum(cost.seconds for (_, name), cost in cells.items() if name == task)
        axes.barh(THEIRS, seconds, left=start, color="#b3432b", alpha=1 - 0.1 * i)
        axes.text(start + seconds / 2, 0, task, ha="center", va="center", color="white", fontsize=8)
        start += seconds
    for name, cost in ((OURS, first), (AGAIN, again)):
        bar = axes.barh(name, cost.seconds, color="#1f5fa8")
        axes.bar_label(bar, [f" {cost.seconds:.1f} s"])
    axes.set(xlabel=f"seconds for {len(cells)} cells")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _compare(ours: Mapping[str, float], theirs: Mapping[str, float], where: str) -> None:
    if dict(ours) != dict(theirs):
        sys.exit(f"{where}: portllm says {dict(ours)}, lm_eval {dict(theirs)}")


def _run(command: Sequence[str], root: Path) -> Cost:
    """Run a process to its end and return what it costs; exit where it fails."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(root / "cache"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    began, used = time.perf_counter(), _cpu_seconds()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return Cost(time.perf_counter() - began, _cpu_seconds() - used)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _apart(make: Any, root: Path, options: argparse.Namespace) -> list[str]:
    """Run `make` in a process of its own, so that what it imports is not in this one; return the patches' names."""
    child = os.fork()
    if child == 0:
        make(root, options)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit("making data and patches failed")
    return [f"patch-{i}" for i in range(options.patches)]


def _make(root: Path, options: argparse.Namespace) -> None:
    """Write data as `portllm prepare` does, the harness's task files on them, and patches."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from portllm.params import PrepareParams
    from portllm.verbs import prepare

    (root / "tasks").mkdir()
    for task in options.tasks:
        prepare.run(dataset=task, out=root / "data" / task, params=PrepareParams(data=str(DATASETS)))
        (root / "tasks" / f"{task}.yaml").write_text(json.dumps(dict(_task_file(root, task))), encoding="utf-8")
    torch.manual_seed(0)
    for i in range(options.patches):
        lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEARS, init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), lora).save_pretrained(root / f"patch-{i}")


def _task_file(root: Path, task: str) -> Iterator[tuple[str, Any]]:
    """Yield the harness's own task on local files, made here and not by portllm's own code."""
    import lm_eval

    files = {path.stem: str(path) for path in sorted((root / "data" / task).glob("*.parquet"))}
    yield "include", str(Path(lm_eval.__file__).parent / "tasks" / TASKS[task])
    yield from {"task": task, "dataset_path": "parquet", "dataset_name": None}.items()
    yield "dataset_kwargs", {"data_files": files}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATASETS / "stories260k", help="the base: a directory")
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--patches", type=int, default=3, help="how many patches next to the base")
    parser.add_argument("--limit", type=int, default=40, help="rows of a task; 0: all")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-fewshot", type=int, default=0)
    parser.add_argument("--errors", action="store_true", help="leave lm_eval its resampling (minutes for each mrpc)")
    parser.add_argument("--table", type=Path, default=None, help="also write the table to this Markdown file")
    parser.add_argument("--plot", type=Path, default=None, help="draw a bar for each run to this file (.svg)")
    options = parser.parse_args()
    options.model = options.model.resolve()
    return options


if __name__ == "__main__":
    main()
