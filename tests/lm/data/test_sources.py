"""Where rows come from: the commit of the hub that is recorded, or files, of which none hides another."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from portllm.errors import DataError
from portllm.lm.data import sources

OLD, NEW = "a" * 40, "b" * 40


def test_a_copy_of_another_commit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # what `datasets` gives, with a warning, when the hub is out of reach: its latest copy, whatever was asked for
    latest = f"/cache/datasets/owner___words/default/0.0.0/{NEW}/words-train.arrow"

    def load(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(cache_files=[{"filename": latest}])

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataError, match="expected commit a{12} from the hub, found only a local copy of b{12}"):
        sources.hub("owner/words", None, ["train"], OLD)


def test_an_empty_folder_does_not_hide_the_file_next_to_it(tmp_path: Path) -> None:
    """issue 8, item 14: DIR/chat/ without files, next to DIR/chat.jsonl, was "holds no data"."""
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "notes.md").write_text("no data", encoding="utf-8")
    (tmp_path / "chat.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    assert sources.here(tmp_path, "chat")
    assert sources.local(tmp_path, "chat").splits["train"].to_pylist() == [{"text": "a"}]
    assert sources.names(tmp_path) == {"chat"}


def test_a_folder_with_data_next_to_a_file_of_its_name_is_refused(tmp_path: Path) -> None:
    """issue 8, item 14: which of the two is meant is not guessed."""
    (tmp_path / "chat").mkdir()
    for path in (tmp_path / "chat" / "train.jsonl", tmp_path / "chat.jsonl"):
        path.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"has both chat/ and chat\.jsonl, expected one of them"):
        sources.local(tmp_path, "chat")


def test_names_of_a_folder_that_does_not_exist_are_none(tmp_path: Path) -> None:
    assert sources.names(tmp_path / "absent") == set()
