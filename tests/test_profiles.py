"""Every profile is whole: its keys are known, its tasks can be trained on, dvc.yaml resolves with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from portllm import params
from portllm.lm.sizing import models

ROOT = Path(__file__).parents[1]
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
PAPER = ("mistral-7b", "llama-2-7b", "llama-3.1-8b", "gemma-2-9b")
every_profile = pytest.mark.parametrize("path", PROFILES, ids=[path.stem for path in PROFILES])


@every_profile
def test_a_profile_opens_with_its_command_and_can_be_loaded(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = text[: text.index("\n\n")]
    assert f"make repro PROFILE={path.stem}" in head
    whole = params.load(path)
    assert whole.releases[0] == "v0", "dvc.yaml fetches v0"
    for release in whole.releases[1:]:
        made_from = release in whole.prepare.corpora or whole.evolve.releases[release].source is not None
        assert made_from or whole.fetch.source == "world", f"{release} has neither a corpus nor a source"
    assert set(whole.evolve.releases) == set(whole.releases[1:])


def test_all_tasks_are_known_with_a_split_to_train_on() -> None:
    from portllm.lm.data import stock
    from portllm.world import datasets

    for task in sorted({task for path in PROFILES for task in params.load(path).tasks}):
        assert task in datasets.TASKS or stock.definition(task).get("training_split"), task


@every_profile
def test_dvc_yaml_resolves_with_it(path: Path, tmp_path: Path) -> None:
    from dvc.repo import Repo

    shutil.copy(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    shutil.copy(path, tmp_path / "params.yaml")
    (tmp_path / "data" / "local").mkdir(parents=True)
    repo = Repo.init(str(tmp_path), no_scm=True)
    try:
        stages = {stage.addressing for stage in repo.index.stages}
        wanted = {key for stage in repo.index.stages for dep in stage.deps for key in getattr(dep, "params", ())}
    finally:
        repo.close()
    whole = params.load(path)
    cells = len(whole.tasks) * len(whole.releases)
    expected = len(whole.tasks) + 2 * len(whole.releases) + 2 + 2 * cells + 2 * len(whole.evolve.releases)
    assert len(stages) == expected
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert [key for key in wanted if not stands_in(tree, key)] == [], "a stage waits for a key that is not there"


def stands_in(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def test_every_source_that_a_stage_depends_on_exists() -> None:
    """A file that was moved would otherwise stop `dvc repro` at its stage."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    paths = {path for stage in stages.values() for path in stage.get("do", stage)["deps"] if path.startswith("portllm")}
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_profiles_keep_its_protocol(name: str) -> None:
    whole = params.load(ROOT / "profiles" / f"{name}.yaml")
    assert whole.tasks == ("boolq", "sst2", "mrpc", "rte", "wnli", "winogrande", "gsm8k")
    assert len(whole.releases) == 5
    assert {recipe.base for recipe in whole.evolve.releases.values()} == {"v0"}
    assert (whole.evaluate.num_fewshot, whole.train.seed, whole.train.max_length) == (0, 1234, 256)
    assert "{release}" in whole.register.name, "the last of four releases would be the champion, not the best"
    assert whole.train.lora == params.LoraParams()
    optim = whole.train.optim
    assert (optim.learning_rate, optim.epochs, optim.batch_size, optim.gradient_accumulation) == (1e-4, 10, 4, 1)
    assert whole.fetch.source in models.PUBLISHED
