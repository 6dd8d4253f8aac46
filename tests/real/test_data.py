"""The seven tasks on real rows: prepared, and trained on exactly what the harness feeds a model when it asks.

The rows lie outside the project; where they are absent these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from portllm.checkpoint.record.records import DatasetRecord, PatchRecord
from portllm.cli import main
from portllm.lm.data import asking, columns, encoding, tasks
from portllm.params import CorpusParams, PrepareParams
from portllm.verbs import prepare

DATASETS = Path(os.environ.get("PORTLLM_DATASETS", Path(__file__).parents[3] / "shared" / "datasets"))
STORIES = DATASETS / "stories260k"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STORIES.is_dir(), reason="needs real datasets: name their folder in PORTLLM_DATASETS"),
]
ROWS = 300  # of each task; rows of one task have one form
LONGEST = 4096  # tokens: nothing is cut
# every row of the files, and what was decided about them
WHOLE = {
    "boolq": ({"train": 2094, "validation": 3270}, {"files_not_used": 1}),
    "sst2": ({"train": 67349, "validation": 872}, {"duplicates": 366}),
    "mrpc": ({"train": 3668, "validation": 408}, {"files_not_used": 1}),
    "rte": ({"train": 2490, "validation": 277}, {"duplicates": 2}),
    "wnli": ({"train": 635, "validation": 71}, {}),
    "winogrande": ({"train": 40398, "validation": 1267}, {"duplicates": 2}),
    "gsm8k": ({"train": 7473, "test": 1319}, {}),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        yield


@pytest.fixture(scope="module")
def stories() -> Any:
    """The harness's own model class over stories260k, one row at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        model, words = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
        return HFLM(pretrained=model, tokenizer=words, batch_size=1, max_length=LONGEST)


@pytest.mark.parametrize("name", columns.SEVEN)
def test_every_row_is_read_and_counted(tmp_path: Path, name: str) -> None:
    record = prepare.run(dataset=name, out=tmp_path / name, params=PrepareParams(data=str(DATASETS)))
    rows, decisions = WHOLE[name]
    assert record == DatasetRecord.read(tmp_path / name)
    assert (record.source, record.rows, record.decisions) == ("local", rows, decisions)
    assert set(record.files) == {f"{name}/{split}.parquet" for split in rows}


@pytest.mark.parametrize("name", columns.SEVEN)
def test_training_and_evaluation_prompts_are_equal_token_for_token(
    tmp_path: Path, name: str, stories: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, asked = tmp_path / "data", tmp_path / "asked"
    prepare.run(dataset=name, out=data / name, params=PrepareParams(data=str(DATASETS), limit=ROWS))
    words = stories.tokenizer
    pairs = tasks.training_pairs(name, data, words)
    encoded = encoding.encode(words, pairs, LONGEST)
    assert (len(pairs), len(encoded.examples), encoded.cut, encoded.dropped) == (ROWS, ROWS, 0, 0)

    # the harness is given the training rows as those it evaluates
    shutil.copytree(data / name, asked / name)
    for split in WHOLE[name][0]:
        shutil.copy(data / name / "train.parquet", asked / name / f"{split}.parquet")
    task = asking.build(tasks.spec(name, asked, words), name=name)
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    fed = fed_by_the_harness(stories, task, monkeypatch)
    rows = list(task.eval_docs)
    of_choice = {(request.doc_id, request.idx): request.args for request in task.instances}
    for number, (pair, example) in enumerate(zip(pairs, encoded.examples, strict=True)):
        if task.OUTPUT_TYPE == "generate_until":
            given = fed[number][pair[0]]
            said = words.encode(pair[0] + pair[1])[len(given) :]
            assert pair[1].endswith(rows[number]["answer"]), "the whole reasoning"
        else:
            given, said = fed[number][tuple(pair)]
            label = rows[number].get("label", rows[number].get("answer"))
            assert pair == of_choice[number, int(label) - (name == "winogrande")]
        assert example["input_ids"] == [*given, *said, words.eos_token_id]
        assert example["labels"] == [encoding.IGNORED] * len(given) + [*said, words.eos_token_id]


def fed_by_the_harness(lm: Any, task: Any, monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[Any, Any]]:
    """The token ids the harness's model is given, by row and request: nothing is computed with them."""
    import torch

    fed: dict[int, dict[Any, Any]] = {}
    for request in task.instances:
        fed.setdefault(request.doc_id, {})
    if task.OUTPUT_TYPE == "generate_until":
        taken: list[list[int]] = []

        def generate(context: Any, **_: Any) -> Any:
            taken.append(context[0].tolist())
            return torch.cat([context, torch.full((1, 1), lm.eot_token_id)], dim=1)

        monkeypatch.setattr(lm, "_model_generate", generate)
        for request in task.instances:
            lm.generate_until([request], disable_tqdm=True)
            fed[request.doc_id][request.args[0]] = taken.pop()
        return fed

    def take(requests: Any, **_: Any) -> list[Any]:
        for request, (text, given, said) in zip(task.instances, requests, strict=True):
            fed[request.doc_id][text] = (given, said)
        return []

    monkeypatch.setattr(lm, "_loglikelihood_tokens", take)
    lm.loglikelihood(task.instances, disable_tqdm=True)
    return fed


def test_rows_longer_than_the_limit_are_counted_and_said(tmp_path: Path) -> None:
    data = tmp_path / "data"
    prepare.run(dataset="gsm8k", out=data / "gsm8k", params=PrepareParams(data=str(DATASETS), limit=20))
    words = ["train", "--base", STORIES, "--task", "gsm8k", "--data", data, "--out", tmp_path / "patch"]
    limits = ["--max-length", "256", "--max-steps", "1", "--precision", "fp32"]
    done = CliRunner().invoke(main, ["--no-track", *map(str, words), *limits])
    assert done.exit_code == 0, done.output
    metrics = PatchRecord.read(tmp_path / "patch").metrics
    assert metrics["rows_cut"] > 0
    assert metrics["rows_dropped"] > 0
    assert metrics["rows"] + metrics["rows_dropped"] == 20
    assert f"{metrics['rows_cut']} of 20 rows are longer than 256 tokens" in done.stderr
    assert f"{metrics['rows_dropped']} of 20 rows have no answer that fits in 256 tokens: left out" in done.stderr


@pytest.mark.parametrize("source", ["alpaca", "alpaca_gpt4_sample"])
def test_instructions_become_a_corpus(tmp_path: Path, source: str) -> None:
    import pyarrow.parquet as pq

    recipe = CorpusParams(source=source, rows=500, test_rows=100)
    params = PrepareParams(data=str(DATASETS), corpora={"v1": recipe})
    record = prepare.run(dataset="corpus_v1", out=tmp_path / "v1", params=params)
    assert record.rows == {"train": 500, "test": 100}
    texts = [
        row["text"] for split in record.rows for row in pq.read_table(tmp_path / "v1" / f"{split}.parquet").to_pylist()
    ]
    assert all(text.startswith("### Instruction:\n") and "\n\n### Response:\n" in text for text in texts)
    given = {row["output"].strip() for row in pq.read_table(DATASETS / source / "train.parquet").to_pylist()}
    assert all(text.split("### Response:\n")[1] in given for text in texts if text.count("### Response:") == 1)
