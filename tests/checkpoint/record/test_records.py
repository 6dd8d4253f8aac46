"""Records come back as they were written, and only as they were written."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from portllm.checkpoint.record.card import port_card
from portllm.checkpoint.record.provenance import versions
from portllm.checkpoint.record.records import PatchRecord, PortRecord, Record, ReleaseRecord, Source
from portllm.errors import CheckpointError

OLD = Source(name="old", fingerprint="1" * 64, revision="main", quantisation="nf4")
RECORDS: list[Record] = [
    PatchRecord(task="t", base=OLD, fingerprint="2" * 64, params={"lora": {"r": 4}}, metrics={"loss": 0.5}),
    PortRecord(
        base=OLD, patch=OLD, trained_on=None, modules={"matched": 1, "total": 2}, tensors={"changed": 1, "copied": 4}
    ),
    PortRecord(base=OLD, patch=OLD, trained_on=OLD, scale=0.5, output="adapter"),
    ReleaseRecord(fingerprint="3" * 64, base=None),
    ReleaseRecord(fingerprint="3" * 64, base=OLD, probe={"world_boolq": 1.0}),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_round_trip(record: Record, tmp_path: Path) -> None:
    record.write(tmp_path)
    assert type(record).read(tmp_path) == record


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"schema_version": None},
        {"more": 1},
        {"base": {"name": "x"}},
        {"base": {"nome": 1}},
        {"base": {"name": 1, "fingerprint": None}},
        {"base": None},
        {"base": {}},
        {"base": "old"},
        {"task": None},
        {"metrics": {"loss": "0.5"}},
        {"metrics": [0.5]},
        {"fingerprint": True},
        None,
    ],
)
def test_anything_else_is_refused(change: dict[str, Any] | None, tmp_path: Path) -> None:
    RECORDS[0].write(tmp_path)
    tree = json.loads((tmp_path / "patch.json").read_text())
    (tmp_path / "patch.json").write_text(json.dumps([] if change is None else {**tree, **change}))
    with pytest.raises(CheckpointError, match=r"patch\.json"):
        PatchRecord.read(tmp_path)


@pytest.mark.parametrize("record", [RECORDS[0], RECORDS[3]], ids=lambda r: r.FILE)
def test_a_record_contains_no_commit_and_older_ones_are_read(record: Record, tmp_path: Path) -> None:
    """The commit is in MLflow; records of earlier versions that contain it stay readable (issue 8, item 20)."""
    record.write(tmp_path)
    tree = json.loads((tmp_path / record.FILE).read_text())
    assert "git_commit" not in tree
    (tmp_path / record.FILE).write_text(json.dumps({**tree, "git_commit": "0" * 40}))
    assert type(record).read(tmp_path) == record


def test_versions_have_no_label_of_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same torch from another package index gives the same record (issue 8, item 20)."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu" if name == "torch" else "1.0")
    assert versions("torch") == {"portllm": "1.0", "torch": "2.13.0"}


def test_a_directory_without_its_record_is_not_complete(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no port\.json, so it is not complete"):
        PortRecord.read(tmp_path)


@pytest.mark.parametrize("record", [r for r in RECORDS if isinstance(r, PortRecord)], ids=["unknown", "known"])
@pytest.mark.filterwarnings("ignore")  # importing the hub's library may warn
def test_the_card_is_one_the_hub_reads(record: PortRecord) -> None:
    from huggingface_hub import ModelCard

    full = PortRecord(**{**vars(record), "modules": {"matched": 1, "total": 2}, "tensors": {"changed": 1, "copied": 4}})
    text = port_card(full)
    card = ModelCard(text)
    assert card.data.base_model == ["old"]
    assert card.data.library_name == ("peft" if record.output == "adapter" else "transformers")
    assert "1 of the base's 2 modules" in text
    assert ("not known" in text) == (record.trained_on is None)
