"""Records come back as they were written, and only as they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from portllm.checkpoint.record.card import port_card
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
