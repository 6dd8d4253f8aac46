"""Snapshots: what was written is read, or is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from portllm.lm.learning.snapshots import Snapshot, Snapshots


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"weight": torch.full((3, 2), step / 3)}, {"loss": step / 7, "rates": [0.1, 1e-30]})


def test_the_newest_is_read_bit_by_bit_and_two_are_kept(tmp_path: Path) -> None:
    place = Snapshots(tmp_path / "new")
    assert place.newest() is None
    for step in (2, 4, 10):
        place.write(snapshot(step))
    found = place.newest()
    assert found is not None
    assert found.step == 10
    assert torch.equal(found.tensors["weight"], snapshot(10).tensors["weight"])
    assert found.state == snapshot(10).state
    assert sorted(int(path.name[:9]) for path in (tmp_path / "new").iterdir()) == [4, 10]


@pytest.mark.parametrize("harm", ["a byte", "cut short", "emptied"])
def test_a_damaged_one_is_passed_over_and_said(tmp_path: Path, harm: str) -> None:
    notes: list[str] = []
    place = Snapshots(tmp_path, notes.append)
    place.write(snapshot(1))
    place.write(snapshot(2))
    newest = max(tmp_path.iterdir())
    content = newest.read_bytes()
    newest.write_bytes({"a byte": content[:-1] + b"\xff", "cut short": content[:-9], "emptied": b""}[harm])
    found = place.newest()
    assert found is not None
    assert found.step == 1
    assert notes == ["the checkpoint after step 2 is damaged and is not used"]


def test_what_a_kill_left_half_written_is_no_snapshot(tmp_path: Path) -> None:
    place = Snapshots(tmp_path)
    place.write(snapshot(1))
    (tmp_path / "partial").write_bytes(max(tmp_path.iterdir()).read_bytes()[:50])
    found = place.newest()
    assert found is not None
    assert found.step == 1
    place.write(snapshot(2))
    assert not (tmp_path / "partial").exists()


def test_a_disk_that_refuses_is_told_of_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    place = Snapshots(tmp_path, notes.append)
    place.write(snapshot(1))
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        place.write(snapshot(2))
    assert [int(path.name[:9]) for path in tmp_path.iterdir()] == [1]
    assert len(notes) == 1
    assert "step 2 could not be written" in notes[0]
    assert "No space left" in notes[0]
    (tmp_path / "file").write_text("1")
    Snapshots(tmp_path / "file", notes.append).write(snapshot(3))
    assert "step 3 could not be written" in notes[1]
