"""Every stage of a patch through the verbs, at toy size: data, release, patch, next release, port, scores."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import portllm
from portllm import params
from portllm.checkpoint.record.records import PatchRecord, PortRecord, ReleaseRecord
from portllm.errors import DataError, EvaluationError, OutputError
from portllm.verbs import evaluate, evolve, fetch, port, prepare, train

TASK = "world_sst2"
QUICK = params.OptimParams(learning_rate=2e-3, max_steps=4, batch_size=8, logging_steps=2, threads=1)
TRAIN = params.TrainParams(optim=QUICK, max_length=64)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
]


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two releases, a patch of the first, and the patch ported onto both."""
    root = tmp_path_factory.mktemp("life")
    sizes = params.PrepareParams(train_rows=40, test_rows=40, documents=200)
    for name, out in ((TASK, f"tasks/{TASK}"), ("corpus_v0", "corpora/v0"), ("corpus_v1", "corpora/v1")):
        prepare.run(dataset=name, out=root / "data" / out, params=sizes)
    v0, v1, patch = root / "v0", root / "v1", root / "patch"
    data = root / "data" / "tasks"
    first = fetch.run(out=v0, corpus=root / "data/corpora/v0", params=params.FetchParams(optim=QUICK))
    evolve.run(base=v0, corpus=root / "data/corpora/v1", out=v1, params=params.EvolveParams(optim=QUICK))
    train.run(base=v0, task=TASK, data=data, out=patch, params=TRAIN)
    for base in (v0, v1):
        port.run(patch=patch, onto=base, source=v0, out=root / f"ported-{base.name}", params=params.PortParams())
    return SimpleNamespace(root=root, v0=v0, v1=v1, patch=patch, data=data, first=first)


def test_every_directory_carries_its_record(life: SimpleNamespace) -> None:
    release, patch = ReleaseRecord.read(life.v1), PatchRecord.read(life.patch)
    ported = PortRecord.read(life.root / "ported-v1")
    assert release.base is not None
    assert release.base.fingerprint == life.first.fingerprint == portllm.fingerprint(life.v0)
    assert patch.base.fingerprint == life.first.fingerprint
    assert ported.base.fingerprint == release.fingerprint
    assert ported.trained_on is not None
    assert ported.trained_on.fingerprint == life.first.fingerprint
    assert ported.patch.fingerprint == patch.fingerprint
    assert set(release.probe) == {"world_boolq", "world_sst2", "world_mrpc", "world_gsm8k"}


def test_records_hold_no_path_of_this_machine(life: SimpleNamespace) -> None:
    for file in life.root.rglob("*.json"):
        assert str(life.root) not in file.read_text(encoding="utf-8"), file


def test_the_same_training_gives_the_same_bytes(life: SimpleNamespace) -> None:
    again = life.root / "again"
    train.run(base=life.v0, task=TASK, data=life.data, out=again, params=TRAIN)
    for file in life.patch.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_another_seed_gives_another_patch(life: SimpleNamespace) -> None:
    other = dataclasses.replace(TRAIN, seed=7)
    record = train.run(base=life.v0, task=TASK, data=life.data, out=life.root / "other", params=other)
    assert record.fingerprint != PatchRecord.read(life.patch).fingerprint


def test_a_failed_training_leaves_nothing(life: SimpleNamespace) -> None:
    out = life.root / "failed" / "patch"
    with pytest.raises(DataError, match="none of 40 rows has an answer that fits"):
        train.run(base=life.v0, task=TASK, data=life.data, out=out, params=dataclasses.replace(TRAIN, max_length=1))
    with pytest.raises(DataError, match="nowhere: no such folder"):
        train.run(base=life.v0, task=TASK, data=life.root / "nowhere", out=out, params=TRAIN)
    with pytest.raises(OutputError, match="overlaps"):
        train.run(base=life.v0, task=TASK, data=life.data, out=life.v0 / "patch", params=TRAIN)
    assert not out.exists()
    assert not out.parent.exists() or not any(out.parent.iterdir())


def test_scores_of_base_ported_and_adapter_over_one_base(life: SimpleNamespace) -> None:
    out, samples = life.root / "scores.json", life.root / "samples.parquet"
    settings = params.EvaluateParams(threads=1)
    evaluate.run(
        model=life.v0,
        tasks=[TASK],
        out=out,
        samples=samples,
        patches=[life.root / "ported-v0", life.patch],
        before=[life.root / "ported-v0"],
        data=life.data,
        news=life.root / "data/corpora/v0",
        params=settings,
    )
    tree = json.loads(out.read_text(encoding="utf-8"))
    rows = {(r["arm"], r["task"]): r for r in tree["results"]}
    assert set(rows) == {
        (a, t) for a in ("base", "ported", "tuned") for t in (TASK, "corpus_v0_recall", "corpus_v0_perplexity")
    }
    assert rows["base", TASK]["patch"] is None
    assert rows["base", TASK]["samples"] == 40
    # the control: ported onto its own base, a patch answers as the unmerged adapter does
    for task in (TASK, "corpus_v0_recall"):
        assert rows["ported", task]["metrics"] == rows["tuned", task]["metrics"]
    assert rows["ported", TASK]["metrics"] != {}
    ported, tuned = (
        rows[arm, "corpus_v0_perplexity"]["metrics"]["word_perplexity,none"] for arm in ("ported", "tuned")
    )
    assert ported == pytest.approx(tuned, rel=1e-5)
    assert ported != pytest.approx(rows["base", "corpus_v0_perplexity"]["metrics"]["word_perplexity,none"], rel=1e-5)
    _check_samples(samples, rows)


def _check_samples(file: Path, rows: dict[tuple[str, str], dict[str, object]]) -> None:
    import pyarrow.parquet as pq

    answers = pq.read_table(file).to_pylist()
    mine = [a["correct"] for a in answers if (a["arm"], a["task"]) == ("tuned", TASK)]
    assert sum(mine) / len(mine) == pytest.approx(rows["tuned", TASK]["metrics"]["acc,none"])  # type: ignore[index]


def test_an_older_model_is_asked_the_news_only(life: SimpleNamespace) -> None:
    result = evaluate.run(
        model=life.v1,
        tasks=[TASK],
        out=life.root / "v1.json",
        patches=[life.root / "ported-v1"],
        before=[life.root / "ported-v0"],
        data=life.data,
        news=life.root / "data/corpora/v1",
        params=params.EvaluateParams(threads=1),
    )
    assert {c.task for c in result.scores if c.arm == "old"} == {"corpus_v1_recall", "corpus_v1_perplexity"}
    kinds = next(c.metrics for c in result.scores if c.task == "corpus_v1_recall")
    assert {"acc_changed,none", "acc_new,none", "acc_kept,none"} <= set(kinds)


def test_a_task_without_data_says_how_to_make_it(life: SimpleNamespace) -> None:
    with pytest.raises(EvaluationError, match="portllm prepare"):
        evaluate.run(
            model=life.v0,
            tasks=["world_mrpc"],
            out=life.root / "no.json",
            data=life.data,
            params=params.EvaluateParams(),
        )
    assert not (life.root / "no.json").exists()


def test_a_release_may_be_a_merged_lora(life: SimpleNamespace) -> None:
    corpus = life.root / "data/corpora/v1"
    section = params.EvolveParams(mode="lora", lora=params.LoraParams(r=4), optim=QUICK)
    record = evolve.run(base=life.v0, corpus=corpus, out=life.root / "v1-lora", params=section)
    names = {p.name for p in (life.root / "v1-lora").iterdir()}
    assert names == {p.name for p in life.v1.iterdir()}, "an ordinary checkpoint, no adapter"
    assert record.fingerprint not in {life.first.fingerprint, ReleaseRecord.read(life.v1).fingerprint}


def test_a_release_may_be_a_local_directory(life: SimpleNamespace) -> None:
    source = life.root / "published"
    shutil.copytree(life.v0, source)
    (source / "pytorch_model.bin").write_bytes(b"pickled weights are never taken along")
    record = fetch.run(out=life.root / "copy", params=params.FetchParams(source=str(source)))
    assert record.fingerprint == life.first.fingerprint
    assert {p.name for p in (life.root / "copy").iterdir()} == {p.name for p in life.v0.iterdir()}
    assert (life.root / "copy/model.safetensors").read_bytes() == (life.v0 / "model.safetensors").read_bytes()


def test_python_calls_port_like_the_command(life: SimpleNamespace) -> None:
    record = portllm.port(life.patch, onto=life.v1, out=life.root / "from-python")
    assert record.fingerprint == PortRecord.read(life.root / "ported-v1").fingerprint
