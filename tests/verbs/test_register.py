"""register: the gate is strict, and only a score of these very tensors opens it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from portllm.checkpoint.record.records import PortRecord, Source
from portllm.errors import CheckpointError, EvaluationError, ParamsError
from portllm.lineage import version_requests
from portllm.params import RegisterParams
from portllm.verbs import register

BASE = "ba" * 32
KIND = {"world_boolq": "acc,none", "world_gsm8k": "exact_match,strict-match"}


@pytest.fixture
def release(tmp_path):
    """Two ported models of v1 and what evaluate wrote about them: boolq gained, gsm8k did not."""
    scores = {"world_boolq": (0.5, 0.9), "world_gsm8k": (0.25, 0.25)}
    rows = []
    for task, (bare, ported) in scores.items():
        folder = tmp_path / "models/ported/v1" / task
        folder.mkdir(parents=True)
        record = PortRecord(
            base=Source(name="models/releases/v1", fingerprint=BASE),
            patch=Source(name=f"models/patches/v0/{task}", fingerprint="fa" * 32),
            task=task,
            fingerprint=digest_of(task),
        )
        record.write(folder)
        rows += [row(task, "base", bare), row(task, "ported", ported, patch=task)]
    # recall of the news is no reason to register a model
    rows.append({**row("v1_recall", "ported", 1.0, patch="world_gsm8k"), "metrics": {"acc,none": 1.0}})
    write(tmp_path, rows)
    return tmp_path


def digest_of(task: str) -> str:
    return task.encode().hex().ljust(64, "0")


def row(task: str, arm: str, score: float, patch: str | None = None) -> dict:
    return {
        "task": task,
        "patch": f"models/ported/v1/{patch}" if patch else None,
        "patch_task": patch,
        "patch_fingerprint": digest_of(patch) if patch else None,
        "arm": arm,
        "metrics": {KIND.get(task, "acc,none"): score, "format,none": 1.0},
        "samples": 480,
    }


def write(root: Path, rows: list[dict]) -> None:
    tree = {"schema_version": 1, "release": "v1", "model": {"name": "models/releases/v1", "fingerprint": BASE}}
    (root / "v1.json").write_text(json.dumps({**tree, "results": rows}))


def judge(root: Path, which: str = "", out: Path | None = None, **params) -> register.RegisterRecord:
    ported = root / "models/ported/v1" / which
    return register.run(ported=ported, results=root / "v1.json", params=RegisterParams(**params), out=out)


def test_only_what_is_above_the_base_arm_is_accepted(release):
    record = judge(release)
    assert [(one.task, one.accepted) for one in record.decisions] == [("world_boolq", True), ("world_gsm8k", False)]
    accepted = record.accepted[0]
    assert (accepted.name, accepted.fingerprint) == ("portllm-world_boolq", digest_of("world_boolq"))
    assert (accepted.metric, accepted.ported_score, accepted.base_score) == ("acc,none", 0.9, 0.5)
    assert record.decisions[1].metric == "exact_match,strict-match"
    assert record.decisions[1].reason == "ported 0.2500 is not above base 0.2500"


def test_a_name_may_tell_releases_apart(release):
    assert [one.name for one in judge(release, name="x-{task}-{release}").accepted] == ["x-world_boolq-v1"]


def test_the_margin_is_strict(release):
    assert judge(release, "world_boolq", margin=0.39).accepted
    assert not judge(release, "world_boolq", margin=0.4).accepted


def test_one_ported_directory_is_judged_alone(release):
    record = judge(release, "world_gsm8k", name="mine")
    assert [(one.name, one.accepted) for one in record.decisions] == [("mine", False)]


def test_record_is_written_complete_and_repeats(release):
    out = release / "results/register/v1.json"
    judge(release, out=out)
    first = out.read_bytes()
    judge(release, out=out)
    assert out.read_bytes() == first
    assert [p.name for p in out.parent.iterdir()] == ["v1.json"]
    tree = json.loads(first)
    assert tree["release"] == "v1"
    assert [one["accepted"] for one in tree["decisions"]] == [True, False]
    assert str(release).encode() not in first


def test_register_leaves_out_models_of_removed_tasks_and_names_them(release):
    """Issue 8, item 8: a task removed from `tasks` has no scores any more, and its model stays on the disk."""
    rows = json.loads((release / "v1.json").read_text())["results"]
    write(release, [one for one in rows if "world_gsm8k" not in (one["task"], one["patch_task"])])
    notes = []
    record = register.run(
        ported=release / "models/ported/v1", results=release / "v1.json", params=RegisterParams(),
        tasks=("world_boolq",), releases=("v0", "v1"), on_note=notes.append,
    )  # fmt: skip
    assert [one.task for one in record.decisions] == ["world_boolq"]
    (note,) = notes
    assert note.startswith(f"{release / 'models/ported/v1/world_gsm8k'}: left out, since `tasks` does not name")


def test_register_leaves_out_a_removed_release_and_names_it(release):
    """Issue 8, item 8."""
    notes = []
    record = register.run(
        ported=release / "models/ported/v1", results=release / "v1.json", params=RegisterParams(),
        tasks=tuple(KIND), releases=("v0", "v2"), on_note=notes.append,
    )  # fmt: skip
    assert record.decisions == ()
    assert len(notes) == 1
    assert "`releases` does not name v1" in notes[0]


def test_scores_of_other_tensors_do_not_count(release):
    stale = {**row("world_boolq", "ported", 0.99, patch="world_boolq"), "patch_fingerprint": "00" * 32}
    write(release, [row("world_boolq", "base", 0.5), stale])
    with pytest.raises(EvaluationError, match="no score of .*world_boolq as it is now"):
        judge(release, "world_boolq")


def test_scores_on_another_base_do_not_count(release):
    folder = release / "models/ported/v1/world_boolq"
    other = PortRecord(base=Source(name="b", fingerprint="99" * 32), patch=Source(name="p", fingerprint=None))
    other.write(folder)
    with pytest.raises(EvaluationError, match="another base"):
        judge(release, "world_boolq")


def test_a_missing_base_arm_is_an_error_not_a_zero(release):
    write(release, [row("world_boolq", "ported", 0.9, patch="world_boolq")])
    with pytest.raises(EvaluationError, match="no score of the base on world_boolq"):
        judge(release, "world_boolq")


def test_an_adapter_is_judged_as_a_merged_model_is(release):
    folder = release / "models/ported/v1/world_boolq"
    record = PortRecord.read(folder)
    replace(record, output="adapter").write(folder)
    assert [one.task for one in judge(release).accepted] == ["world_boolq"]


@pytest.mark.parametrize(("name", "message"), [("same", "put {task} into it"), ("a-{taks}", "may contain {task}")])
def test_names_that_cannot_tell_models_apart_are_refused(release, name, message):
    with pytest.raises(ParamsError, match=message):
        judge(release, name=name)


def test_what_is_not_there_is_named(release, tmp_path):
    with pytest.raises(EvaluationError, match="run portllm evaluate first"):
        register.run(ported=release / "models/ported/v1", results=tmp_path / "no.json", params=RegisterParams())
    with pytest.raises(CheckpointError, match="run portllm port"):
        register.run(ported=tmp_path / "models", results=release / "v1.json", params=RegisterParams())


@pytest.mark.parametrize(("experiment", "alias"), [(None, "champion"), ("seed-1", None)])
def test_an_experiment_registers_without_taking_the_alias(release, monkeypatch, experiment, alias) -> None:
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    if experiment:
        monkeypatch.setenv("DVC_EXP_NAME", experiment)
    ported = release / "models/ported/v1"
    record = register.run(ported=ported, results=release / "v1.json", params=RegisterParams())
    (request,) = version_requests(record, ported)
    assert (request.name, request.alias) == ("portllm-world_boolq", alias)
    assert request.checkpoint == ported / "world_boolq"


def test_a_row_without_metrics_is_an_error_that_names_it(release):
    """issue 8, item 16: it was a KeyError."""
    broken = row("world_boolq", "ported", 0.9, patch="world_boolq")
    del broken["metrics"]
    write(release, [row("world_boolq", "base", 0.5), broken])
    with pytest.raises(EvaluationError, match=r"v1.json: result 1 \(world_boolq\) has no metrics; run"):
        register.run(ported=release / "models/ported/v1", results=release / "v1.json", params=RegisterParams())
