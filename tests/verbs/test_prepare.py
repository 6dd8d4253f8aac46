"""prepare: a user's own rows become a task, the hub's data come at one commit, real text becomes a corpus."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from portllm.checkpoint.record.records import DatasetRecord
from portllm.errors import DataError, OutputError, ParamsError
from portllm.lm.data import own, tasks
from portllm.params import CorpusParams, PrepareParams
from portllm.verbs import prepare
from tests import hub as standin

OWN = [{"prompt": f"{n} plus one is", "completion": str(n + 1)} for n in range(30)]
TALKS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(12)
]


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def made(tmp_path: Path, name: str, **params: Any) -> DatasetRecord:
    return prepare.run(
        dataset=name, out=tmp_path / "out" / name, params=PrepareParams(data=str(tmp_path / "data"), **params)
    )


def test_one_file_is_split_by_chance_the_same_each_time(tmp_path: Path) -> None:
    lines(tmp_path / "data" / "mine.jsonl", [*OWN, {**OWN[0], "completion": "one"}])
    record = made(tmp_path, "mine")
    assert record.rows == {"train": 25, "validation": 3, "test": 3}
    assert record.decisions == {"held_out": 6, "spaces_added": 31}
    assert record.source == "local"
    out = tmp_path / "out" / "mine"
    asked = {split: {row["prompt"] for row in rows(out / f"{split}.parquet")} for split in record.rows}
    assert not asked["train"] & (asked["test"] | asked["validation"])
    assert not asked["validation"] & asked["test"]
    assert set().union(*asked.values()) == {row["prompt"] for row in OWN}
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    prepare.run(dataset="mine", out=out, params=PrepareParams(data=str(tmp_path / "data")), force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    prepare.run(dataset="mine", out=out, params=PrepareParams(data=str(tmp_path / "data"), seed=1), force=True)
    assert (out / "test.parquet").read_bytes() != before["test.parquet"]


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_every_form_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    given = [*OWN[:3], {"prompt": 'a "quoted", comma\nand a line', "completion": " é"}]
    table = pa.Table.from_pylist(given)
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        path = folder / f"{split}.{ending}"
        shown = given if split == "train" else [{"prompt": "other", "completion": "thing"}]
        table = pa.Table.from_pylist(shown)
        {
            "csv": lambda t=table, p=path: pyarrow.csv.write_csv(t, p),
            "parquet": lambda t=table, p=path: pq.write_table(t, p),
            "jsonl": lambda s=shown, p=path: lines(p, s),
        }[ending]()
    made(tmp_path, "mine")
    found = rows(tmp_path / "out" / "mine" / "train.parquet")
    assert [row["prompt"] for row in found] == [row["prompt"] for row in given]
    assert [row["completion"] for row in found] == [" 1", " 2", " 3", " é"]


def test_what_is_prepared_is_known_by_name(tmp_path: Path) -> None:
    lines(tmp_path / "data" / "mine.jsonl", OWN)
    made(tmp_path, "mine")
    data = tmp_path / "out"
    pairs = tasks.training_pairs("mine", data)
    assert pairs == [(row["prompt"], row["completion"]) for row in rows(data / "mine" / "train.parquet")]
    spec = tasks.spec("mine", data)
    assert isinstance(spec, dict)
    assert spec["output_type"] == "loglikelihood"
    assert set(spec["dataset_kwargs"]["data_files"]) == {"train", "validation", "test"}
    assert list(tasks.digests("mine", data, "evaluation")) == ["mine/test.parquet", "mine/task.yaml"]


def test_completions_may_be_choices(tmp_path: Path) -> None:
    given = [{"prompt": f"{n}:", "completion": "even" if n % 2 == 0 else "odd"} for n in range(30)]
    lines(tmp_path / "data" / "mine.jsonl", given)
    made(tmp_path, "mine", output_type="multiple_choice")
    config = own.load(tmp_path / "out" / "mine")
    assert config["doc_to_choice"] == [" even", " odd"]
    for row in rows(tmp_path / "out" / "mine" / "train.parquet"):
        assert config["doc_to_choice"][row["label"]] == row["completion"]
    lines(tmp_path / "data" / "odd" / "train.jsonl", given)
    lines(tmp_path / "data" / "odd" / "test.jsonl", [{"prompt": "x", "completion": "neither"}])
    with pytest.raises(DataError, match="row 0 of test: ' neither' is not the completion of a training row"):
        made(tmp_path, "odd", output_type="multiple_choice")


def test_chats_keep_their_messages(tmp_path: Path) -> None:
    shared = [{"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b!"}]}]
    lines(tmp_path / "data" / "mine" / "train.jsonl", TALKS)
    lines(tmp_path / "data" / "mine" / "test.jsonl", shared)
    made(tmp_path, "mine", output_type="generate_until")
    out = tmp_path / "out" / "mine"
    assert rows(out / "train.parquet") == TALKS
    assert rows(out / "test.parquet")[0]["messages"][1] == {"role": "assistant", "content": "b!"}
    assert own.load(out)["metadata"]["chat"] is True
    with pytest.raises(DataError, match="chats have no multiple choice"):
        prepare.run(
            dataset="mine",
            out=tmp_path / "x",
            params=PrepareParams(data=str(tmp_path / "data"), output_type="multiple_choice"),
        )


@pytest.mark.parametrize("name", ["", ".", "..", "../mine", "a/b", "a b", "-x", "a\0b"])
def test_a_name_that_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    lines(tmp_path / "data" / "mine.jsonl", OWN)
    with pytest.raises(DataError, match="not the name of a task"):
        prepare.run(dataset=name, out=tmp_path / "out", params=PrepareParams(data=str(tmp_path / "data")))


@pytest.mark.parametrize("share", [0.0, 0.5, -1.0])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(ParamsError, match="held_out"):
        PrepareParams(held_out=share)


def test_a_release_without_text_has_its_record_alone(tmp_path: Path) -> None:
    params = PrepareParams(data=str(tmp_path))
    record = prepare.run(dataset="corpus_v0", out=tmp_path / "v0", params=params, text="none")
    assert (record.source, record.rows) == ("none", {})
    assert [path.name for path in (tmp_path / "v0").iterdir()] == ["dataset.json"]
    with pytest.raises(DataError, match=r"name its source in prepare\.corpora\.v1"):
        prepare.run(dataset="corpus_v1", out=tmp_path / "v1", params=params, text="corpora")


def test_a_release_reads_what_its_recipe_names(tmp_path: Path) -> None:
    lines(tmp_path / "data" / "tales" / "train.jsonl", [{"text": f"tale number {n}"} for n in range(50)])
    recipe = CorpusParams(source="tales", rows=20, test_rows=5)
    record = made(tmp_path, "corpus_v1", corpora={"v1": recipe})
    assert record.rows == {"train": 20, "test": 5}
    assert set(record.files) == {"tales/train.jsonl"}
    out = tmp_path / "out" / "corpus_v1"
    assert not {r["text"] for r in rows(out / "train.parquet")} & {r["text"] for r in rows(out / "test.parquet")}


def parquet(given: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in given]), file)
    return file.getvalue()


README = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
---
"""
SUMS = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(9)]


def on_the_hub(hub: standin.Hub, home: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """portllm in a process of its own, whose hub is the stand-in."""
    home.mkdir(exist_ok=True)
    own_keys = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN")
    kept = {key: value for key, value in os.environ.items() if key not in own_keys}
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}
    command = [sys.executable, "-m", "portllm", "--no-track", "prepare", *words, "--data", str(home)]
    return subprocess.run(command, env={**kept, **place, **more}, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_hubs_data_come_at_one_commit(tmp_path: Path) -> None:
    with standin.running() as hub:
        first = {
            "README.md": README.encode(),
            "main/train-00000-of-00001.parquet": parquet(SUMS[:6]),
            "main/test-00000-of-00001.parquet": parquet(SUMS[5:]),
        }
        old = hub.add("datasets/openai/gsm8k", first)
        new = hub.add("datasets/openai/gsm8k", {**first, "main/train-00000-of-00001.parquet": parquet(SUMS[:3])})
        out = tmp_path / "now"
        done = on_the_hub(hub, tmp_path / "home", "gsm8k", "--out", str(out))
        assert done.returncode == 0, done.stderr
        record = DatasetRecord.read(out)
        assert (record.source, record.revision) == ("openai/gsm8k", new)
        assert record.rows == {"train": 3, "test": 4}

        (tmp_path / "pinned.yaml").write_text(f"prepare: {{revisions: {{gsm8k: {old}}}}}\n", encoding="utf-8")
        words = ("gsm8k", "--out", str(tmp_path / "then"), "--params", str(tmp_path / "pinned.yaml"))
        done = on_the_hub(hub, tmp_path / "home", *words)
        assert done.returncode == 0, done.stderr
        record = DatasetRecord.read(tmp_path / "then")
        assert (record.revision, record.rows) == (old, {"train": 5, "test": 4})
        assert record.decisions == {"overlap": 1}
        assert rows(tmp_path / "then" / "train.parquet") == SUMS[:5]
        assert not any("main/train" in path and new not in path and old not in path for _, path in hub.asked)

        # the library's cache now has `old` last, and would give it for any other commit when the hub fails
        hub.failures = {"/api/datasets/": (503, "busy"), "/datasets/": (503, "busy")}
        other = tmp_path / "other.yaml"
        other.write_text(f"prepare: {{revisions: {{gsm8k: {'d' * 40}}}}}\n", encoding="utf-8")
        done = on_the_hub(
            hub, tmp_path / "home", "gsm8k", "--out", str(tmp_path / "no"), "--params", str(other), HF_HUB_OFFLINE="1"
        )
        assert done.returncode == 1
        assert f"expected commit {'d' * 12} from the hub, found only a local copy of {old[:12]}" in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        words = ("gsm8k", "--out", str(tmp_path / "again"), "--params", str(tmp_path / "pinned.yaml"))
        done = on_the_hub(hub, tmp_path / "home", *words, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        assert DatasetRecord.read(tmp_path / "again") == DatasetRecord.read(tmp_path / "then")
        hub.failures = {}

        hub.repos["datasets/openai/gsm8k"]["gated"] = True
        done = on_the_hub(hub, tmp_path / "other", "gsm8k", "--out", str(tmp_path / "no"))
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "gated; accept its terms" in done.stderr
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("revision", [None, "main", "a" * 40])
def test_the_revision_reaches_the_library_as_a_commit(monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    import datasets

    from portllm.lm.data import sources
    from portllm.lm.remote import refusals

    asked: list[Any] = []

    class Api:
        def dataset_info(self, repo: str, revision: str | None) -> Any:
            asked.append((repo, revision))
            return type("Info", (), {"sha": "b" * 40})()

    def load_dataset(repo: str, config: str | None, **rest: Any) -> Any:
        asked.append((repo, config, rest))
        return datasets.Dataset.from_dict({"text": ["a", "b", "c"]})

    monkeypatch.setattr(refusals, "api", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = sources.hub("me/texts", None, ["train"], revision, choose=lambda count: [count - 1])
    commit = revision if revision == "a" * 40 else "b" * 40
    assert loaded.revision == commit
    assert asked[-1] == ("me/texts", None, {"split": "train", "revision": commit})
    assert len(asked) == (1 if revision == "a" * 40 else 2)
    assert loaded.splits["train"].to_pylist() == [{"text": "c"}]


def test_without_the_hub_the_line_says_how_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (tmp_path / "data").mkdir()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="out of reach.*--data DIR"):
        made(tmp_path, "sst2")
    assert not (tmp_path / "out").exists()


def test_corpus_stages_depend_on_all_that_makes_a_corpus() -> None:
    import yaml

    root = Path(__file__).parents[2]
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    base, later = stages["prepare-base"], stages["prepare-corpus"]["do"]
    assert "evolve.releases.${key}" in later["params"], "whether the release has text of its own is in its recipe"
    for stage in (base, later):
        assert {"portllm/lm/data", "portllm/verbs/prepare.py", "portllm/world"} <= set(stage["deps"])


def test_an_out_that_is_there_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_make", lambda *_: pytest.fail("was read"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(OutputError, match="--force"):
        prepare.run(dataset="world_sst2", out=out, params=PrepareParams())
