"""Measure every stage of `dvc repro` in a fresh clone, then a second `dvc repro`, which runs nothing.

    python benchmarks/pipeline.py            # the complete pipeline, in a temporary directory
    python benchmarks/pipeline.py fetch      # only the stages that a target needs

Seconds are wall time of the stage's own process, imports included; peak memory is its largest resident set. The last
line reports whether the clone is still as committed: on the kind of CPU that dvc.lock was made on it is.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

# comes before the real command on PATH: runs it, and appends the kernel's figures of it to a log
METER = f"""#!{sys.executable} -SE
import json, os, sys, time
started = time.monotonic()
child = os.spawnv(os.P_NOWAIT, {str(BIN / "portllm")!r}, ["portllm", *sys.argv[1:]])
_, status, usage = os.wait4(child, 0)
row = {{
    "stage": os.environ["DVC_STAGE"],
    "wall_seconds": time.monotonic() - started,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "peak_rss_bytes": usage.ru_maxrss * 1024,
}}
with open(os.environ["PORTLLM_METER"], "a") as log:
    log.write(json.dumps(row) + "\\n")
sys.exit(os.waitstatus_to_exitcode(status))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="stages to reproduce (default: all)")
    parser.add_argument("--keep", type=Path, help="clone into this new directory and keep it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep.resolve() if arguments.keep else Path(scratch)
        folder.mkdir(parents=True, exist_ok=not arguments.keep)
        clone, log, shim = folder / "clone", folder / "log.jsonl", folder / "bin" / "portllm"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        shim.parent.mkdir()
        shim.write_text(METER, encoding="utf-8")
        shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
        env = {
            **os.environ,
            "PATH": os.pathsep.join([str(shim.parent), str(BIN), os.environ["PATH"]]),
            "PORTLLM_METER": str(log),
            "HF_HUB_OFFLINE": "1",
        }
        first = repro(clone, env, arguments.targets)
        again = repro(clone, env, arguments.targets)
        show([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()], first, again)
        print(f"as committed: {committed(clone)}")


def committed(clone: Path) -> str:
    """Return whether git finds no change in `clone`, else the changes."""
    status = ["git", "status", "--porcelain"]
    changes = subprocess.run(status, cwd=clone, check=True, capture_output=True, text=True).stdout
    return f"no\n{changes}" if changes else "yes, git status --porcelain is empty"


def repro(clone: Path, env: dict[str, str], targets: list[str]) -> float:
    """Run `dvc repro` in `clone`; return its seconds."""
    started = time.monotonic()
    subprocess.run(["dvc", "repro", "--quiet", *targets], cwd=clone, env=env, check=True)
    return time.monotonic() - started


def show(rows: list[dict[str, object]], first: float, again: float) -> None:
    """Print a row per stage, a row per verb, and the two totals."""
    print("| stage | wall s | CPU s | peak memory MiB |\n|---|---:|---:|---:|")
    verbs: dict[str, list[dict[str, object]]] = defaultdict(list)
    for row in rows:
        verbs[str(row["stage"]).split("@")[0]].append(row)
        print(line(str(row["stage"]), [row]))
    print("\n| verb (runs) | wall s | CPU s | peak memory MiB |\n|---|---:|---:|---:|")
    for verb, runs in verbs.items():
        print(line(f"{verb} ({len(runs)})", runs))
    print(f"\ndvc repro from scratch: {first:.0f} s, {len(rows)} stages; a second dvc repro: {again:.1f} s")


def line(name: str, runs: list[dict[str, object]]) -> str:
    """Return one row of a table: seconds added up, the largest peak."""
    wall = sum(float(str(r["wall_seconds"])) for r in runs)
    cpu = sum(float(str(r["cpu_seconds"])) for r in runs)
    peak = max(int(str(r["peak_rss_bytes"])) for r in runs) / 2**20
    return f"| {name} | {wall:.1f} | {cpu:.1f} | {peak:.0f} |"


if __name__ == "__main__":
    main()
