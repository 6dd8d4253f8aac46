"""What runs again by the real dvc.yaml and `dvc repro`, with a stand-in that writes each stage's outputs."""

from __future__ import annotations

import itertools
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portllm import params

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.pipeline

# writes every output of a stage, with content that depends on the command alone, and logs the call
STAND_IN = f"""#!{sys.executable} -SE
import os, sys
words = sys.argv[1:]
with open("calls.txt", "a") as log:
    log.write(os.environ["DVC_STAGE"] + "\\n")
for flag in ("--out", "--cost", "--samples", "--metrics", "--plots"):
    if flag in words:
        path = words[words.index(flag) + 1]
        if "." not in os.path.basename(path):
            os.makedirs(path)
            path += "/content.txt"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(" ".join(words))
"""


@pytest.fixture
def small(project: Callable[..., Any], tmp_path: Path) -> Any:
    """The project with two tasks and releases, few parameters, and the stand-in for `portllm`."""
    stand_in = tmp_path / "bin" / "portllm"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN, encoding="utf-8")
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    one = project(path=[stand_in.parent])
    write(one, releases=["v0", "v1"])
    return one


def write(one: Any, releases: list[str]) -> None:
    """Write params.yaml with two tasks, these releases and no values below a section's own.

    DVC parses params.yaml and dvc.lock again for each stage; with all of them that takes a minute.
    """
    import yaml

    tree = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section in (section for section in tree.values() if isinstance(section, dict)):
        section.update({key: {} for key, value in section.items() if isinstance(value, dict)})
    tree |= {"tasks": tree["tasks"][:2], "releases": releases}
    tree["evolve"]["releases"] = {name: {"base": base} for base, name in itertools.pairwise(releases)}
    (one.folder / "params.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def calls(one: Any) -> list[str]:
    """Run `dvc repro`; returns the stages that ran, in order."""
    log = one.folder / "calls.txt"
    log.unlink(missing_ok=True)
    one.dvc("repro", "-q")
    return log.read_text(encoding="utf-8").split() if log.exists() else []


def stages(tasks: int, releases: int) -> int:
    """Return how many stages the pipeline has."""
    return tasks + 4 * releases + 2 * tasks * releases


@pytest.mark.slow
def test_a_new_release_trains_no_old_patch_again(small: Any) -> None:
    first = calls(small)
    assert len(first) == len(set(first)) == stages(tasks=2, releases=2)
    verbs = [stage.split("@")[0] for stage in first]
    order = [verbs.index(verb) for verb in ("fetch", "evolve", "train", "port", "evaluate", "report")]
    assert order == sorted(order)

    assert calls(small) == [], "a second run must run nothing"

    write(small, releases=["v0", "v1", "v9"])
    tasks = params.load(ROOT / "params.yaml").tasks[:2]
    assert sorted(calls(small)) == sorted(
        [
            "prepare-corpus@v9",
            "evolve@v9",
            *(f"train@{task}-v9" for task in tasks),
            *(f"port@{task}-v9" for task in tasks),
            "evaluate@v9",
            "report",
            "register@v9",
        ]
    )


@pytest.mark.slow
def test_the_projects_own_parameters_give_a_stage_for_each_task_and_release(project: Callable[..., Any]) -> None:
    """Count the stages of params.yaml as it is, which the test above replaces by a smaller one."""
    current = params.load(ROOT / "params.yaml")
    listed = project().dvc("stage", "list", "--name-only").stdout.split()
    assert len(listed) == len(set(listed)) == stages(len(current.tasks), len(current.releases))
    assert {f"train@{task}-{release}" for task in current.tasks for release in current.releases} <= set(listed)


def test_every_stage_is_the_verb_of_its_name() -> None:
    import yaml

    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    for name, stage in yaml.safe_load(text)["stages"].items():
        command = stage.get("do", stage)["cmd"].split()
        assert command[:2] == ["portllm", name.split("-")[0]]
        assert "--params params.yaml" in " ".join(command)
