"""Compare the experiment over several seeds of the complete pipeline; `make seeds` prints this at its end.

    make seeds SEEDS="1 2"           # run them as DVC experiments, then print the tables
    python benchmarks/seeds.py       # print the tables again
    python benchmarks/seeds.py --commits 5

Reads the workspace (the default seed) and the experiments named seed-… on the current commit.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
ARMS = ("base", "tuned", "ported", "retuned")
RECALL_ARMS = ("base", "old", "ported", "retuned")
KINDS = ("changed", "new", "kept")


def main() -> None:
    import dvc.api
    import yaml

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", type=int, default=1, help="how many commits back to look for experiments")
    commits = parser.parse_args().commits

    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    rows = [row for row in dvc.api.exp_show(str(ROOT), num=commits) if wanted(row)]
    names = [str(row.get("Experiment") or "default") for row in rows]
    print(f"seeds: {', '.join(names)} (mean ± standard deviation over {len(rows)}, then each)\n")
    for release in params["releases"]:
        table(release, rows, [(task, task, arm) for task in [*params["tasks"], "mean"] for arm in ARMS])
        table(
            f"{release} knowledge",
            rows,
            [(f"knowledge.{arm}", arm, kind) for arm in RECALL_ARMS for kind in KINDS],
            release,
        )
    table("base probe", rows, [("probe", "probe", task) for task in params["tasks"]], params["releases"][0])


def table(title: str, rows: list[dict[str, Any]], cells: list[tuple[str, str, str]], release: str = "") -> None:
    """Print one table of percentages: a row per cell that any seed measured."""
    print(f"| {title} | mean ± sd | each seed |\n|---|---:|---|")
    for group, label, leaf in cells:
        values = [number(row.get(f"{release or title}.{group}.{leaf}")) for row in rows]
        if all(math.isnan(v) for v in values):
            continue
        measured = [v for v in values if not math.isnan(v)]
        spread = f" ± {100 * stdev(measured):.1f}" if len(measured) > 1 else ""
        print(
            f"| {label} {leaf} | {100 * fmean(measured):.1f}{spread} | {' · '.join(f'{100 * v:.1f}' for v in values)} |"
        )
    print()


def wanted(row: dict[str, Any]) -> bool:
    """Return whether a row is the workspace, or an experiment of `make seeds` that has succeeded."""
    succeeded = row.get("State") in (None, "", "Success")
    return row.get("rev") == "workspace" or (succeeded and str(row.get("Experiment") or "").startswith("seed-"))


def number(value: Any) -> float:
    """Return a metric as a float; nan where it was not measured."""
    return float(value) if isinstance(value, int | float) else math.nan


if __name__ == "__main__":
    main()
