"""What runs again, held on the real dvc.yaml and `dvc repro`, with a stand-in that writes each stage's outputs."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from portllm import params

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.pipeline

# writes every output a stage names, with content that depends on the command alone, and notes the call
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
def calls(project: Callable[..., object], tmp_path: Path) -> Callable[..., list[str]]:
    """calls(edit): `dvc repro` after an optional edit of params.yaml; the stages that ran, in order."""
    stand_in = tmp_path / "bin" / "portllm"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN, encoding="utf-8")
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    one = project(path=[stand_in.parent])

    def run(*edits: tuple[str, str]) -> list[str]:
        for old, new in edits:
            one.edit(old, new)  # type: ignore[attr-defined]
        log = one.folder / "calls.txt"  # type: ignore[attr-defined]
        log.unlink(missing_ok=True)
        one.dvc("repro", "-q")  # type: ignore[attr-defined]
        return log.read_text(encoding="utf-8").split() if log.exists() else []

    return run


def test_a_new_release_trains_no_old_patch_again(calls: Callable[..., list[str]]) -> None:
    whole = params.load(ROOT / "params.yaml")
    tasks, releases = whole.tasks, whole.releases
    first = calls()
    cells = len(tasks) * len(releases)
    assert len(first) == len(set(first)) == len(tasks) + 3 * len(releases) + 2 * cells + len(releases)
    verbs = [stage.split("@")[0] for stage in first]
    assert [verbs.index(v) for v in ("fetch", "evolve", "train", "port", "evaluate", "report")] == sorted(
        verbs.index(v) for v in ("fetch", "evolve", "train", "port", "evaluate", "report")
    )

    assert calls() == [], "a second run must run nothing"

    last = releases[-1]
    ran = calls(
        (f"{last}]", f"{last}, v9]"),
        (
            f"    {last}: {{base: {releases[-2]}}}\n",
            f"    {last}: {{base: {releases[-2]}}}\n    v9: {{base: {last}}}\n",
        ),
    )
    assert sorted(ran) == sorted(
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


def test_every_stage_is_the_verb_of_its_name() -> None:
    import yaml

    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    for name, stage in yaml.safe_load(text)["stages"].items():
        command = stage.get("do", stage)["cmd"].split()
        assert command[:2] == ["portllm", name.split("-")[0]]
        assert "--params params.yaml" in " ".join(command)
