"""Real text: every arm on SST-2 over several whole-chain seeds, from a base pretrained by ourselves.

    python benchmarks/realtext.py                  # the table again, from what was run
    python benchmarks/realtext.py --run            # runs profiles/real-text.yaml for each seed first
    python benchmarks/realtext.py --run --seeds 1234 1 2

Each seed is a workspace beside that of `make repro PROFILE=real-text`, with the same dvc.yaml and the profile's
parameters; the seed decides the texts, the pretraining, the update and the patches. Data: see the profile's head.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
PROFILE = "real-text"
TASK = "sst2"
ARMS = {
    "v0 base": ("v0", TASK, "base"),
    "v0 tuned": ("v0", TASK, "tuned"),
    "v1 base": ("v1", TASK, "base"),
    "v1 ported": ("v1", TASK, "ported"),
    "v1 retuned": ("v1", TASK, "retuned"),
}
DIFFERENCES = {
    "ported - base": ("v1 ported", "v1 base"),
    "ported - retuned": ("v1 ported", "v1 retuned"),
    "ported - v0 tuned": ("v1 ported", "v0 tuned"),
}
OTHERS = {
    "recovery": ("v1", TASK, "recovery"),
    "negative flips": ("v1", TASK, "negative_flips"),
    "drift of v1 from v0": ("v1", "drift", "from_v0"),
}
NEWS = {
    "v0 tuned": ("v1", "knowledge", "old", "perplexity"),
    "v1 base": ("v1", "knowledge", "base", "perplexity"),
    "v1 ported": ("v1", "knowledge", "ported", "perplexity"),
    "v1 retuned": ("v1", "knowledge", "retuned", "perplexity"),
}
# what makes a folder a workspace: see `workspace` in the Makefile
LINKS = ("dvc.yaml", "portllm", ".dvcignore", "data/local", ".dvc/plots")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the profile for every seed first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "workspaces", help="where to look for the results")
    chosen = parser.parse_args()
    places = {seed: chosen.folder / f"{PROFILE}-seed-{seed}" for seed in chosen.seeds}
    if chosen.run:
        subprocess.run(["make", "workspace", f"PROFILE={PROFILE}"], cwd=ROOT, check=True)
        for seed, place in places.items():
            run(seed, place)
    done = {seed: place for seed, place in places.items() if (place / "results" / "metrics.json").is_file()}
    if not done:
        raise SystemExit(f"nothing was run in {chosen.folder}; pass --run")
    report(done)


def run(seed: int, place: Path) -> None:
    """The profile's pipeline with `seed` everywhere, in a workspace of its own; what is done is not done again."""
    frame = ROOT / "workspaces" / PROFILE
    for name in LINKS:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if not (place / name).is_symlink():
            (place / name).symlink_to((frame / name).readlink())  # as deep as the frame: relative links hold
    for name in (".dvc/config", ".dvc/.gitignore"):
        shutil.copyfile(frame / name, place / name)
    profile = (ROOT / "profiles" / f"{PROFILE}.yaml").read_text(encoding="utf-8")
    (place / "params.yaml").write_text(re.sub(r"\bseed: 1234\b", f"seed: {seed}", profile), encoding="utf-8")
    subprocess.run(["dvc", "repro"], cwd=place, check=True)


def report(places: dict[int, Path]) -> None:
    """Print the tables: a column per seed."""
    trees = {seed: json.loads((place / "results" / "metrics.json").read_text()) for seed, place in places.items()}
    scores = {arm: [100 * float(at(tree, path)) for tree in trees.values()] for arm, path in ARMS.items()}
    head = "".join(f" | seed {seed}" for seed in places)
    print(f"| {TASK}, accuracy in % | mean ± sd{head} |\n|---|{'---:|' * (1 + len(places))}")
    line("always the commoner answer", [majority(place) for place in places.values()])
    for arm, values in scores.items():
        line(arm, values)
    for name, (one, other) in DIFFERENCES.items():
        line(name, [a - b for a, b in zip(scores[one], scores[other], strict=True)], form="{:+.1f}")
    for name, path in OTHERS.items():
        line(f"{name}, %", [100 * float(at(tree, path)) for tree in trees.values()])
    for name, path in NEWS.items():
        values = [float(at(tree, path)) for tree in trees.values()]
        line(f"perplexity a word of v1's held-out text: {name}", values, form="{:.3g}")
    line("minutes", [minutes(place) for place in places.values()])


def line(name: str, values: list[float], *, form: str = "{:.1f}") -> None:
    """One row: the mean and standard deviation, then every seed."""
    spread = f" ± {form.format(stdev(values)).lstrip('+')}" if len(values) > 1 else ""
    print(f"| {name} | {form.format(fmean(values))}{spread} | {' | '.join(form.format(v) for v in values)} |")


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf of a metrics tree."""
    for key in path:
        tree = tree[key]
    return tree


def majority(place: Path) -> float:
    """Share in % of the commoner label among the rows that are asked."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    labels = pq.read_table(place / "data" / "tasks" / TASK / "validation.parquet").column("label")
    return 100 * max(pc.value_counts(labels).field("counts").to_pylist()) / len(labels)


def minutes(place: Path) -> float:
    """Wall time of the stages that compute, as they recorded it."""
    costs = sorted((place / "results" / "cost").rglob("*.json"))
    return sum(float(json.loads(cost.read_text())["wall_seconds"]) for cost in costs) / 60


if __name__ == "__main__":
    main()
