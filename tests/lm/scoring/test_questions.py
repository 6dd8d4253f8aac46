"""The tasks of an evaluation: on files of DATA, or the hub's; the same requests for every patch."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import pytest

from portllm.errors import DataError, EvaluationError
from portllm.lm.data import tasks
from portllm.lm.scoring import questions
from portllm.lm.scoring.questions import Questions
from portllm.params import EvaluateParams
from portllm.world import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_a_folder_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="slip: no such folder"):
        Questions(["boolq"], data=tmp_path / "slip", news=None)
    monkeypatch.chdir(tmp_path)
    assert Questions(["boolq"], data=None, news=None).of_the_hub() == ["boolq"]


def test_tasks_without_files_are_the_hub_s(tmp_path: Path) -> None:
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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sums = [{"question": f"what is {i} plus 1", "answer": f"it is {i + 1} #### {i + 1}"} for i in range(12)]
    facts = [
        {"sentence": f"Anna likes {word}", "label": i % 2, "idx": i} for i, word in enumerate(["tea", "cake", "rain"])
    ]
    for task, split, rows in [("gsm8k", "train", sums), ("gsm8k", "test", sums[:3]), ("sst2", "validation", facts),
                              ("sst2", "train", facts)]:  # fmt: skip
        (tmp_path / task).mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / task / f"{split}.parquet")
    return tmp_path


def load(name: str, data: Path, **params: Any) -> Any:
    return questions.load_tasks([tasks.spec(name, data)], EvaluateParams(**params))[name]


def prompts(task: Any) -> list[str]:
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [request.args[0] for request in task.instances]


@pytest.mark.parametrize(("num_fewshot", "examples"), [(0, 0), (3, 3), (-1, 5)])
def test_examples_in_the_prompt_are_as_many_as_asked(data: Path, num_fewshot: int, examples: int) -> None:
    texts = prompts(load("gsm8k", data, num_fewshot=num_fewshot))
    assert [text.count("Question:") for text in texts] == [examples + 1] * 3


def test_the_same_examples_every_time_a_task_is_asked(data: Path) -> None:
    task = load("gsm8k", data, num_fewshot=3)
    first = prompts(task)
    assert len(set(first)) == 3
    assert prompts(task) == first == prompts(load("gsm8k", data, num_fewshot=3))
    assert prompts(load("gsm8k", data, num_fewshot=3, seed=1)) != first


def test_requests_given_out_again_hold_no_old_answer(data: Path) -> None:
    task = load("sst2", data)
    prompts(task)
    task.instances[0].resps.append((-1.0, True))
    prompts(task)
    assert all(request.resps == [] for request in task.instances)


def test_how_many_documents_are_asked(data: Path) -> None:
    task = load("sst2", data)
    assert [questions.documents(task, EvaluateParams(limit=n)) for n in (0, 2, 9)] == [3, 2, 3]
    assert (questions.asked_split(task), questions.asked_split(load("gsm8k", data))) == ("validation", "test")


def test_a_task_nobody_knows_is_an_error(data: Path) -> None:
    with pytest.raises(EvaluationError, match=r"sst3.*did you mean"):
        questions.load_tasks([tasks.spec("sst3", data)], EvaluateParams())


def test_building_requests_draws_no_bar(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(prompts(load("sst2", data))) == 6
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_no_obstacle_to_reading_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """issue 8, item 16: `datasets` converts local files in a cache, which may be in a home that cannot be written."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", Path("/dev/null/datasets"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    notes: list[str] = []
    asked = Questions(["sst2", "gsm8k"], data=data, news=None, on_note=notes.append)
    loaded = asked.load(["sst2", "gsm8k"], {}, tokenizer.build(), EvaluateParams())
    assert [len(task.eval_docs) for task in loaded.values()] == [3, 3]
    (note,) = notes
    assert note.startswith("/dev/null/datasets: cannot be written (Not a directory); data are read")
    assert list((tmp_path / "tmp").glob("portllm-datasets-*"))
    del asked, loaded
    gc.collect()
    assert not list((tmp_path / "tmp").iterdir()), "nothing is left behind"
