"""The pipeline in a fresh clone, at another commit and another time, leaves that clone as it is committed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
FILES = (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml")
TASK = "world_sst2"
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")


def shrink(tree: dict[str, Any]) -> None:
    """Take one task, two releases, and so few rows and steps that most of the time is the stages' start."""
    tree |= {"tasks": [TASK], "releases": ["v0", "v1"]}
    tree["prepare"] |= {"train_rows": 40, "test_rows": 40, "documents": 200}
    for section in ("fetch", "evolve", "train"):
        tree[section]["optim"] |= {"max_steps": 2, "logging_steps": 1, "threads": 1}
    tree["evolve"]["releases"] = {"v1": {"base": "v0"}}
    tree["train"]["per_task"] = {}
    tree["evaluate"] |= {"limit": 8}
    tree["report"] |= {"bootstrap_samples": 50}


@pytest.fixture
def committed(project: Callable[..., Any], forked: Path) -> Any:
    """A git repository of the project whose pipeline has run, with its results committed as the project's are."""
    import yaml

    one = project(path=[forked])
    for folder in (".git", ".dvc"):
        shutil.rmtree(one.folder / folder)
    for name in FILES:
        (one.folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, one.folder / name)
    (one.folder / "data" / "local" / "README.md").write_text("data of one's own\n", encoding="utf-8")
    params = one.folder / "params.yaml"
    tree = yaml.safe_load(params.read_text(encoding="utf-8"))
    shrink(tree)
    params.write_text(yaml.safe_dump(tree), encoding="utf-8")
    one.env |= {"XDG_CACHE_HOME": str(one.folder.parent / "first-cache")}
    git(one.folder, "init", "--quiet")
    git(one.folder, "add", "--all")
    git(one.folder, "commit", "--quiet", "-m", "Add the project")
    one.dvc("repro", "-q", "report")
    git(one.folder, "add", "--all")
    git(one.folder, "commit", "--quiet", "-m", "Add its results")
    return one


def git(folder: Path, *words: str) -> str:
    """Return the output of `git …`, which must succeed."""
    return subprocess.run([*GIT, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_repro_in_a_fresh_clone_leaves_git_status_empty(committed: Any) -> None:
    """No stage's output contains the commit, the time or what it cost (issue 8, item 20)."""
    clone = committed.folder.parent / "clone"
    git(committed.folder, "clone", "--quiet", str(committed.folder), str(clone))
    git(clone, "commit", "--quiet", "--allow-empty", "-m", "Be another commit")
    tracked = git(clone, "ls-files")
    assert "dvc.lock" in tracked
    assert "results/metrics.json" in tracked
    assert "results/cost" not in tracked
    lock = (clone / "dvc.lock").read_text(encoding="utf-8")
    assert "results/cost/" not in re.sub(r"cmd: .*(\n {6}.*)*", "", lock)  # named in commands alone
    assert str(committed.folder.parent) not in lock

    committed.folder = clone
    committed.env |= {
        "XDG_CACHE_HOME": str(clone.parent / "second-cache"),
        "DVC_SITE_CACHE_DIR": str(clone / ".dvc/tmp"),
    }
    output = committed.dvc("repro", "report").stdout
    assert git(clone, "status", "--porcelain") == ""
    assert output.count("Running stage '") == 12, "restored from a cache instead of run"
    assert len(list((clone / "results/cost").rglob("*.json"))) == 8
