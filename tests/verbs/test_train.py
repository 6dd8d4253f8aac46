"""train: killed and run again it makes the same bytes; what it took is told, and kept out of the patch."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from portllm import cli
from portllm.checkpoint.files.output import kept
from portllm.checkpoint.record.records import PatchRecord
from portllm.errors import CheckpointError, EvaluationError, MachineError, ParamsError
from portllm.lm.learning import llama, loading, pretraining
from portllm.lm.scoring import evaluation
from portllm.params import ArchitectureParams, EvolveParams, LoraParams, OptimParams, PrepareParams, TrainParams
from portllm.verbs import prepare, train
from portllm.world import tokenizer

SCRIPT = Path(__file__).with_name("killed_train.py")
MOMENTS = 6
TASK = "world_sst2"
OPTIM = OptimParams(learning_rate=1e-2, max_steps=4, batch_size=4, logging_steps=2, threads=1)
PARAMS = TrainParams(max_length=64, optim=OPTIM, lora=LoraParams(r=2, alpha=4))
SAVING = EvolveParams(optim=dataclasses.replace(OPTIM, save_steps=1))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base of some thousand parameters, and rows to train on."""
    root = tmp_path_factory.mktemp("work")
    words = tokenizer.build()
    shape = ArchitectureParams(hidden_size=16, intermediate_size=32, layers=2, heads=2)
    llama.new_llama(words, shape, seed=0).save_pretrained(root / "base")
    words.save_pretrained(root / "base")
    sizes = PrepareParams(train_rows=26, test_rows=40)
    prepare.run(dataset=TASK, out=root / "data" / TASK, params=sizes)
    return SimpleNamespace(base=root / "base", data=root / "data")


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_it_makes_the_same_bytes(work: SimpleNamespace, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(work.base), str(work.data), str(tmp_path / "there" / "out")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(MOMENTS)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["killed"] >= MOMENTS - 1 + 2, seen  # the last moment may come after OUT is there
    assert seen["resumed"] >= MOMENTS // 2, seen  # or the kills came too early to find a snapshot
    assert seen["damaged"] == 1, seen


def run(work: SimpleNamespace, out: Path, params: TrainParams = PARAMS, **more: object) -> PatchRecord:
    return train.run(base=work.base, task=TASK, data=work.data, out=out, params=params, **more)  # type: ignore[arg-type]


def test_snapshots_of_other_work_are_not_gone_on_with(
    work: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = dataclasses.replace(PARAMS, optim=dataclasses.replace(OPTIM, save_steps=1))
    out, plain = tmp_path / "out", tmp_path / "plain"

    def stop(step: int, _: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(work, out, saving, on_progress=stop)
    assert len(list(tmp_path.glob(".out.kept/*/*.safetensors"))) == 2
    other = dataclasses.replace(saving, seed=7)
    notes: list[str] = []
    run(work, out, other, on_note=notes.append)
    assert notes == []
    run(work, plain, dataclasses.replace(other, optim=OPTIM))
    assert (out / "adapter_model.safetensors").read_bytes() == (plain / "adapter_model.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plain"]


def test_an_error_leaves_no_snapshot_but_one_of_the_machine_does(work: SimpleNamespace, tmp_path: Path) -> None:
    saving = dataclasses.replace(PARAMS, optim=dataclasses.replace(OPTIM, save_steps=1))

    def fail(error: Exception) -> None:
        def at(step: int, _: int) -> None:
            if step == 3:
                raise error

        with pytest.raises(type(error)):
            run(work, tmp_path / "out", saving, on_progress=at)

    fail(MachineError("no memory"))
    assert [p.name for p in tmp_path.iterdir()] == [".out.kept"]
    fail(ParamsError("wrong"))
    assert list(tmp_path.iterdir()) == []


def test_what_training_took_is_told_and_stands_in_no_record(work: SimpleNamespace, tmp_path: Path) -> None:
    told: list[dict[str, float]] = []
    run(work, tmp_path / "out", on_cost=lambda figures: told.append(dict(figures)))
    (figures,) = told
    assert 0 < figures["useful_tokens_per_second"] <= figures["tokens_per_second"]
    assert figures["train_peak_rss_bytes"] > 10**8
    assert 0 < figures["cpu_utilisation"] < 1.5
    assert figures["processes"] == 1
    written = (tmp_path / "out" / "patch.json").read_text()
    assert not [key for key in figures if key in written]


@pytest.mark.parametrize("harm", ["cut short", "another size", "no JSON"])
def test_a_broken_base_is_said_in_one_line(work: SimpleNamespace, tmp_path: Path, harm: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(work.base, base)
    weights, config = base / "model.safetensors", base / "config.json"
    if harm == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif harm == "another size":
        config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 48}))
    else:
        config.write_text("{")
    with pytest.raises(CheckpointError, match="config.json says" if harm == "another size" else "whole base"):
        loading.frozen_base(base, OPTIM)
    with pytest.raises(CheckpointError):
        loading.trainable_base(base, OPTIM)
    with pytest.raises(EvaluationError, match="cannot load it"):
        evaluation.load_model(base)


def test_a_gpu_that_is_too_small_for_the_base_is_no_broken_base(
    work: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    for load in (lambda: loading.frozen_base(work.base, OPTIM), lambda: evaluation.load_model(work.base)):
        with pytest.raises(MachineError, match="does not fit into the GPU's memory"):
            load()


def test_a_base_with_another_template_is_other_work(work: SimpleNamespace, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(work.base, base)
    before = train._key(base, TASK, {}, PARAMS), pretraining.key(base, {}, SAVING)
    assert before == (train._key(base, TASK, {}, PARAMS), pretraining.key(base, {}, SAVING))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    after = train._key(base, TASK, {}, PARAMS), pretraining.key(base, {}, SAVING)
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (dataclasses.replace(PARAMS, quantization="4bit"), "4bit needs"),
        (
            dataclasses.replace(PARAMS, optim=dataclasses.replace(OPTIM, attention="flash_attention_2")),
            "flash_attention_2 needs",
        ),
    ],
)
def test_what_this_machine_lacks_is_said_and_nothing_is_left(
    work: SimpleNamespace, tmp_path: Path, params: TrainParams, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MachineError, match=match):
        run(work, tmp_path / "out", params)
    assert list(tmp_path.iterdir()) == []


def test_the_place_for_snapshots_is_beside_out_under_a_key(tmp_path: Path) -> None:
    assert kept(tmp_path / "out", "key") == tmp_path / ".out.kept" / "key"


def test_a_quantised_base_is_named_in_the_record(
    work: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loading.frozen_base
    monkeypatch.setattr(loading, "frozen_base", lambda base, optim, quantization: whole(base, optim))
    record = run(work, tmp_path / "out", dataclasses.replace(PARAMS, quantization="4bit"))
    assert record.base.quantisation == "bitsandbytes-nf4"
    assert PatchRecord.read(tmp_path / "out").base == record.base


def test_training_that_diverges_is_one_line_and_leaves_nothing(work: SimpleNamespace, tmp_path: Path) -> None:
    """Issue 8, item 1: an all-NaN patch was published, and scored above its base."""
    words = ["--base", str(work.base), "--data", str(work.data), "--task", TASK, "--out", str(tmp_path / "out")]
    flags = ["--max-steps", "6", "--learning-rate", "1e30", "--max-length", "64", "--lora-r", "2"]
    done = CliRunner().invoke(cli.main, ["-q", "--no-track", "train", *words, *flags, "--json", "--save-steps", "1"])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: training stopped at step "), done.stderr
    assert done.stderr.count("\n") == 1
    assert "lower optim.learning_rate (now 1e+30)" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "noted"), [({"learning_rate": 0.0}, True), ({"warmup_ratio": 0.9}, True), ({}, False)]
)
def test_patch_that_changes_nothing_is_noted(
    work: SimpleNamespace, tmp_path: Path, change: dict[str, float], noted: bool
) -> None:
    """Issue 8, item 1: no learning rate at all, or none in the only step, the first of the warm-up."""
    notes: list[str] = []
    optim = dataclasses.replace(OPTIM, max_steps=1, **change)
    run(work, tmp_path / "out", dataclasses.replace(PARAMS, optim=optim), on_note=notes.append)
    assert [note.startswith("the patch changes nothing") for note in notes] == [True] * noted


def test_the_last_step_stands_in_curve_and_record(work: SimpleNamespace, tmp_path: Path) -> None:
    """Issue 8, item 1: logging_steps is larger than the number of steps, or does not divide it."""
    for logging_steps, steps in ((100, [4]), (3, [3, 4])):
        optim = dataclasses.replace(OPTIM, logging_steps=logging_steps)
        out = tmp_path / str(logging_steps)
        record = run(work, out, dataclasses.replace(PARAMS, optim=optim))
        rows = [line.split(",") for line in (out / "history.csv").read_text().splitlines()[1:]]
        assert [int(step) for step, _, _ in rows] == steps
        assert record.metrics["loss"] == float(rows[-1][1])
