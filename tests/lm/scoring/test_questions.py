"""What is asked of whom: files of DATA, or the hub; a DATA that is not there is never the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from portllm.errors import DataError, EvaluationError
from portllm.lm.scoring.questions import Questions


def test_a_folder_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="slip: no such folder"):
        Questions(["boolq"], data=tmp_path / "slip", news=None)
    monkeypatch.chdir(tmp_path)
    assert Questions(["boolq"], data=None, news=None).of_the_hub() == ["boolq"]


def test_tasks_without_files_are_told_as_the_hubs(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    questions = Questions(["sst2", "boolq", "world_sst2"], data=tmp_path, news=None)
    assert questions.of_the_hub() == ["boolq"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("tickts", r"no such task .* did you mean tickets\?"), ("world_bolq", r"did you mean world_boolq\?")],
)
def test_a_misspelt_task_is_refused_before_it_is_called_the_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    """issue 8, item 14: evaluate said "asked from the hub, not pinned", loaded the model, and only then failed."""
    (tmp_path / "data" / "tasks" / "tickets").mkdir(parents=True)
    (tmp_path / "data" / "tasks" / "tickets" / "test.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert Questions(["tickets"], data=None, news=None).folder("tickets") == Path("data/tasks/tickets")
    for data in (None, Path("data/tasks")):
        with pytest.raises(EvaluationError, match=says):
            Questions([name], data=data, news=None)
