"""The real pipeline on a world that takes seconds: in an archive without git, with links, with a task removed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]
TASKS = ("world_sst2", "world_mrpc")
KEPT, REMOVED = TASKS


@pytest.fixture(scope="module")
def world(archive: Any) -> Any:
    """Two releases and two tasks, run whole by `make repro`; its output is `world.first`."""
    edit(archive, shrink)
    archive.first = make(archive, "repro")
    return archive


def shrink(tree: dict[str, Any]) -> None:
    """Take so few rows and steps that the libraries' imports are most of the time, and register every model."""
    tree |= {"tasks": list(TASKS), "releases": ["v0", "v1"]}
    tree["prepare"] |= {"train_rows": 40, "test_rows": 40, "documents": 200}
    for section in ("fetch", "evolve", "train"):
        tree[section]["optim"] |= {"max_steps": 2, "logging_steps": 1, "threads": 1}
    tree["evolve"]["releases"] = {"v1": {"base": "v0"}}
    tree["train"]["per_task"] = {}
    tree["evaluate"] |= {"limit": 8}
    tree["report"] |= {"bootstrap_samples": 50}
    tree["register"] |= {"margin": -1.0}


def edit(one: Any, change: Callable[[dict[str, Any]], object]) -> None:
    """Change params.yaml."""
    import yaml

    file = one.folder / "params.yaml"
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    change(tree)
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")


def make(one: Any, *words: str) -> str:
    """Return the output of `make …`, which must succeed."""
    env = {name: value for name, value in one.env.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    done = subprocess.run(
        ["make", "-o", ".venv/.ready", *words], cwd=one.folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def portllm(one: Any, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `portllm …` in the project."""
    command = [str(one.folder / ".venv/bin/portllm"), *words]
    return subprocess.run(command, cwd=one.folder, env=one.env, capture_output=True, text=True, check=False)


def stages(output: str) -> list[str]:
    """Return the stages that `dvc repro` ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]


def decided(one: Any) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((one.folder / "results/register/v1.json").read_text())
    return {decision["task"]: decision for decision in tree["decisions"]}


def test_make_repro_in_a_tree_without_git_runs_the_pipeline(world: Any) -> None:
    """Issue 8, item 10."""
    assert not (world.folder / ".git").exists()
    assert "core.no_scm is set" in world.first
    assert len(stages(world.first)) == 18
    assert set(decided(world)) == set(TASKS)
    assert "not a git repository" not in world.first
    again = make(world, "repro")
    assert stages(again) == []
    assert "core.no_scm" not in again


def test_links_into_the_cache_of_dvc_are_followed(world: Any, tmp_path: Path) -> None:
    """Issue 8, item 9: `register` and `verify` failed on what `dvc checkout --relink` makes."""
    world.dvc("config", "--local", "cache.type", "symlink")
    world.dvc("checkout", "--relink")
    ported = f"models/ported/v1/{KEPT}"
    assert (world.folder / ported / "port.json").is_symlink()
    patch, base = f"models/patches/v0/{KEPT}", "models/releases/v1"
    for words in (
        ("verify", ported, "--onto", base, "--patch", patch),
        ("port", patch, "--onto", base, "--out", str(tmp_path / "ported")),
        ("verify", str(tmp_path / "ported")),
        ("fingerprint", ported),
    ):
        done = portllm(world, *words)
        assert done.returncode == 0, done.stderr

    edit(world, lambda tree: tree["register"].update(name="linked-{task}"))
    assert stages(make(world, "repro")) == ["register@v1"]
    kept = list((world.folder / "mlartifacts").rglob("model.safetensors"))
    assert len(kept) >= 2
    assert not any(path.is_symlink() for path in (world.folder / "mlartifacts").rglob("*"))
    assert not list((world.folder / ".dvc/tmp").glob("portllm-*"))

    record = world.folder / ported / "port.json"
    record.unlink()
    record.symlink_to(world.folder / patch / "patch.json")
    refused = portllm(world, "verify", ported)
    record.unlink()
    world.dvc("checkout", "-q")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1


def test_a_removed_task_is_left_out_by_every_stage_and_adapters_go_through_all(world: Any) -> None:
    """Issue 8, item 8, and `port.as=adapter` end to end."""
    edit(world, lambda tree: (tree.update(tasks=[KEPT]), tree["port"].update({"as": "adapter"})))
    output = make(world, "repro")
    ran = stages(output)
    assert sorted(ran) == sorted(
        [*(f"{stage}-{v}" for v in ("v0", "v1") for stage in (f"port@{KEPT}",)), "evaluate@v0", "evaluate@v1",
         "report", "register@v1"]
    )  # fmt: skip
    assert f"register: models/ported/v1/{REMOVED}: left out, since `tasks` does not name {REMOVED}" in output
    report = next(line for line in output.splitlines() if line.startswith("report: left out"))
    for orphan in (f"models/patches/v0/{REMOVED}", f"models/ported/v1/{REMOVED}"):
        assert orphan in report

    assert set(decided(world)) == {KEPT}
    metrics = json.loads((world.folder / "results/metrics.json").read_text())
    assert KEPT in metrics["v1"]
    assert REMOVED not in json.dumps(metrics)
    assert REMOVED not in (world.folder / "results/report/report.md").read_text()

    ported = world.folder / "models/ported/v1" / KEPT
    assert (ported / "adapter_model.safetensors").is_file()
    assert portllm(world, "verify", str(ported)).returncode == 0
    scores = json.loads((world.folder / "results/evaluate/v1.json").read_text())["results"]
    assert {row["patch_task"] for row in scores} == {None, KEPT}
    assert f"{REMOVED}: is for {REMOVED}, which is not among the tasks; left out" in output
    rows = {(row["task"], row["arm"]) for row in scores}
    assert {(KEPT, "base"), (KEPT, "ported"), (KEPT, "tuned")} <= rows
    assert stages(make(world, "repro")) == []
