"""Every way a dataset is not what it should be: one line that names the row, or a decision that is counted and said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from portllm.checkpoint.record.records import DatasetRecord
from portllm.cli import main

GOOD = [
    {"sentence1": f"the cat sat on mat {n}", "sentence2": f"a cat was on mat {n}", "label": n % 2, "idx": n}
    for n in range(8)
]
ASKED = [{"sentence1": f"a dog {n}", "sentence2": "a dog", "label": n % 2, "idx": n} for n in range(4)]
OWN = [{"prompt": f"{n} plus one is", "completion": str(n + 1)} for n in range(20)]


def changed(number: int, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **(values if at == number else {})} for at, row in enumerate(GOOD)]


def lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path.read_bytes()


def prepare(name: str, data: Path, *more: str | Path) -> Result:
    out = data.parent / "out"
    words = ["--no-track", "prepare", name, "--data", str(data), "--out", str(out), *map(str, more)]
    return CliRunner().invoke(main, words)


def lay(tmp_path: Path, files: Mapping[str, bytes]) -> Path:
    data = tmp_path / "data"
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    return data


def refused(tmp_path: Path, done: Result, says: str) -> None:
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("Error: ")
    assert says in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "nothing is left behind"


MRPC: dict[str, tuple[bytes, str]] = {
    "missing column": (
        lines([{k: v for k, v in row.items() if k != "label"} for row in GOOD]),
        "lacks the column label",
    ),
    "empty split": (b"", "train.jsonl: has no rows"),
    "label too high": (lines(changed(3, label=2)), "train: row 3: label is 2, expected 0 to 1"),
    "label hidden": (lines(changed(3, label=-1)), "label is -1 (-1 hides a label), expected 0 to 1"),
    "label null": (lines(changed(3, label=None)), "row 3: label is null"),
    "label in words": (lines([{**row, "label": "yes"} for row in GOOD]), "row 0: label is 'yes'"),
    "label a fraction": (lines(changed(3, label=0.5)), "label is"),
    "text null": (lines(changed(2, sentence1=None)), "row 2: sentence1 is null, expected text"),
    "text a number": (lines([{**row, "sentence1": 5} for row in GOOD]), "row 0: sentence1 is 5, expected text"),
    "types mixed": (lines(changed(5, sentence1=5)), "column sentence1: row 5 is 5, a int, those before are str"),
    "not utf-8": (lines(GOOD[:2]) + b'{"sentence1": "caf\xe9"}\n', "line 3 is not UTF-8 (byte 0xe9 at 18)"),
    "utf-16": ("\ufeff".encode("utf-16-le") + lines(GOOD).decode().encode("utf-16-le"), "line 1 is not UTF-8"),
    "lone surrogate": (lines(GOOD[:1]).replace(b"the cat", b"\\ud800"), "column sentence1"),
    "not json": (lines(GOOD) + b"{oops}\n", "line 9 is not valid JSON"),
    "an array": (json.dumps(GOOD).encode(), "line 1 is a JSON list"),
    "a bare number": (b"7\n", "line 1 is a JSON int"),
    "key twice": (b'{"sentence1": "a", "sentence1": "b"}\n', "line 1 has the key 'sentence1' twice"),
    "not a number": (lines(GOOD).replace(b'"label": 1', b'"label": NaN', 1), "line 2 holds NaN"),
    "thousands of digits": (b'{"idx": ' + b"9" * 5000 + b"}\n", "line 1 is not valid JSON"),
    "too deep": (b"[" * 100_000, "is not valid JSON"),
    "a number beyond": (lines(changed(1, idx=2**70)), "column idx"),
    "all asked": (lines(ASKED), "every one of 4 training rows has the question of an evaluation row"),
}


@pytest.mark.parametrize("case", MRPC)
def test_bad_rows_of_a_known_task_are_refused(tmp_path: Path, case: str) -> None:
    content, says = MRPC[case]
    data = lay(tmp_path, {"mrpc/train.jsonl": content, "mrpc/validation.jsonl": lines(ASKED)})
    refused(tmp_path, prepare("mrpc", data), says)


FILES: dict[str, tuple[str, dict[str, bytes], str]] = {
    "no split to ask": ("mrpc", {"mrpc/train.jsonl": lines(GOOD)}, "has no split validation"),
    "no split to train on": ("mrpc", {"mrpc/validation.jsonl": lines(GOOD)}, "has no split train"),
    "no data at all": ("mrpc", {"mrpc/notes.md": b"x"}, "has no data"),
    "a misspelt name": (  # issue 8, item 14
        "tickts",
        {"tickets.jsonl": lines(OWN)},
        "tickts: no such task in the LM Evaluation Harness nor in the embedded world; did you mean tickets?",
    ),
    "a folder and a file": (  # issue 8, item 14
        "own",
        {"own/train.jsonl": lines(OWN), "own.jsonl": lines(OWN)},
        "has both own/ and own.jsonl, expected one of them",
    ),
    "two files of a split": (
        "mrpc",
        {"mrpc/train.jsonl": lines(GOOD), "mrpc/train.csv": b"a\n1\n", "mrpc/validation.jsonl": lines(ASKED)},
        "split train has several files (train.csv, train.jsonl)",
    ),
    "csv ragged": ("own", {"own.csv": b"prompt,completion\na,b\na,b,c\n"}, "line 3 has 3 fields, the header names 2"),
    "csv short": ("own", {"own.csv": b"prompt,completion\na,b\na\n"}, "line 3 has 1 fields"),
    "csv open quote": ("own", {"own.csv": b'prompt,completion\n"a,b\n'}, "not valid CSV"),
    "csv column twice": ("own", {"own.csv": b"prompt,prompt\na,b\n"}, "two columns named prompt"),
    "csv empty": ("own", {"own.csv": b""}, "has no rows"),
    "csv header alone": ("own", {"own.csv": b"prompt,completion\n"}, "has no rows"),
    "csv not utf-8": ("own", {"own.csv": b"prompt,completion\ncaf\xe9,b\n"}, "line 2 is not UTF-8"),
    "parquet broken": ("own", {"own.parquet": b"PAR1 and so on"}, "not a readable parquet file"),
    "other columns": (
        "own",
        {"own.jsonl": lines([{"q": "a", "a": "b"}])},
        "expected the columns prompt and completion",
    ),
    "too few to split": ("own", {"own.jsonl": lines(OWN[:2])}, "too few to hold 1 out twice"),
    "one thing asked": ("own", {"own.jsonl": lines([{**OWN[0], "completion": str(n)} for n in range(9)])}, "too few"),
    "nothing said": ("own", {"own.jsonl": lines([{"prompt": "a", "completion": " "}])}, "none of 1 rows"),
    "odd file names": (
        "own",
        {"own/train.jsonl": lines(OWN), "own/dev.jsonl": lines(OWN)},
        "expected files named train, validation, test",
    ),
    "half a chat": (
        "own",
        {"own.jsonl": lines([{"messages": [{"role": "user", "content": "hello"}]}])},
        "expected a question, and the assistant last",
    ),
    "a stranger in the chat": (
        "own",
        {"own.jsonl": lines([{"messages": [{"role": "tool", "content": "hello"}]}])},
        "message 0 is by 'tool'",
    ),
    "a chat of numbers": (
        "own",
        {"own.jsonl": lines([{"messages": [{"role": "user", "content": 5}]}])},
        "message 0 says 5, expected text",
    ),
    "a chat of words": (
        "own",
        {"own.jsonl": lines([{"messages": ["hi", "there"]}])},
        "message 0 is 'hi', expected role",
    ),
    "a role of several": (
        "own",
        {"own.jsonl": lines([{"messages": [{"role": ["user"], "content": "hello"}]}])},
        "message 0 is by ['user']",
    ),
    "no chat": ("own", {"own.jsonl": lines([{"messages": "hello"}])}, "expected a list of messages"),
    "winogrande's answer": (
        "winogrande",
        {
            "winogrande/train.jsonl": lines([{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "3"}]),
            "winogrande/validation.jsonl": lines([{"sentence": "c _", "option1": "x", "option2": "y", "answer": "1"}]),
        },
        "answer is '3', expected one of 1, 2",
    ),
    "winogrande's blank": (
        "winogrande",
        {
            "winogrande/train.jsonl": lines([{"sentence": "a b", "option1": "x", "option2": "y", "answer": "2"}]),
            "winogrande/validation.jsonl": lines([{"sentence": "c _", "option1": "x", "option2": "y", "answer": "1"}]),
        },
        "does not fit",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_refused(tmp_path: Path, case: str) -> None:
    name, files, says = FILES[case]
    refused(tmp_path, prepare(name, lay(tmp_path, files)), says)


def test_text_that_is_no_utf8_inside_a_parquet_file_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = lay(tmp_path, {"own/README.md": b""})
    raw = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": raw, "completion": raw}), data / "own" / "train.parquet")
    refused(tmp_path, prepare("own", data), "UTF8")


def test_what_is_left_out_or_changed_is_counted_and_said(tmp_path: Path) -> None:
    rows = [*OWN, OWN[0], {"prompt": " ", "completion": "x"}, {"prompt": "x", "completion": ""}]
    asked = [{"prompt": "3  PLUS one is", "completion": " 4", "note": "the same question in other clothes"}]
    files = {"own/train.jsonl": b"\xef\xbb\xbf" + lines(rows), "own/test.jsonl": lines(asked)}
    done = prepare("own", lay(tmp_path, files), "--limit", "15")
    assert done.exit_code == 0, done.output
    record = DatasetRecord.read(tmp_path / "out")
    assert record.decisions == {
        "beyond_limit": 5,
        "byte_order_marks": 1,
        "columns_not_used": 1,
        "duplicates": 1,
        "empty": 2,
        "overlap": 1,
        "spaces_added": 21,
    }
    assert record.rows == {"train": 15, "test": 1}
    assert set(record.files) == {"own/train.jsonl", "own/test.jsonl"}
    assert len(done.stderr.splitlines()) == len(record.decisions)
    assert "1 training rows have the question of an evaluation row: left out" in done.stderr


def test_a_training_row_that_is_asked_is_taken_out_of_a_known_task(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    asked = {**ASKED[2], "sentence1": "A  Dog 2", "label": 1, "idx": 9}
    files = {
        "mrpc/train.jsonl": lines([*GOOD, asked]),
        "mrpc/validation.jsonl": lines(ASKED),
        "mrpc/test.csv": b"a\n1\n",
    }
    done = prepare("mrpc", lay(tmp_path, files), "--json")
    record = json.loads(done.stdout)
    assert record["decisions"] == {"files_not_used": 1, "overlap": 1}
    assert record["rows"] == {"train": 8, "validation": 4}
    assert pq.read_table(tmp_path / "out" / "train.parquet").to_pylist() == GOOD, "nothing else has changed"
    assert "1 training rows have the question of an evaluation row" in done.stderr


def test_a_path_that_cannot_be_looked_at_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    refused(tmp_path, prepare("x" * 300, tmp_path / "data"), "cannot be read (File name too long)")


@pytest.mark.parametrize("name", ["sst2", "own"])
def test_a_misspelt_folder_of_data_is_not_the_hub(tmp_path: Path, name: str) -> None:
    """issue 8, item 14: `--data` without such a folder went on to the hub."""
    lay(tmp_path, {"own.jsonl": lines(OWN)})
    refused(tmp_path, prepare(name, tmp_path / "dtaa"), "dtaa: no such folder; expected DATA/")
    assert "did you mean" in prepare(name, tmp_path / "dtaa").stderr


def test_out_may_not_be_the_data_it_is_made_from(tmp_path: Path) -> None:
    data = lay(tmp_path, {"own/train.jsonl": lines(OWN)})
    words = ["prepare", "own", "--data", str(data), "--out", str(data / "own"), "--force"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert "overlaps the input" in done.stderr
    assert (data / "own" / "train.jsonl").read_bytes() == lines(OWN)


@pytest.mark.parametrize("label", ["--1", "9" * 30, "9" * 5000, "\u0661", "1e0"])
def test_a_label_in_csv_that_is_no_small_number_is_refused(tmp_path: Path, label: str) -> None:
    rows = f"sentence1,sentence2,label\na,b,{label}\n".encode()
    data = lay(tmp_path, {"mrpc/train.csv": rows, "mrpc/validation.jsonl": lines(ASKED)})
    refused(tmp_path, prepare("mrpc", data), "train: row 0: label is '")


def test_what_parquet_cannot_hold_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "more": {}} for row in GOOD]
    data = lay(tmp_path, {"mrpc/train.jsonl": lines(rows), "mrpc/validation.jsonl": lines(ASKED)})
    refused(tmp_path, prepare("mrpc", data), "train: parquet cannot store it")


@pytest.mark.parametrize("messages", [["hi", "there"], [{"role": ["user"], "content": "hello"}]])
def test_a_corpus_of_no_chats_is_refused(tmp_path: Path, messages: list[Any]) -> None:
    data = lay(tmp_path, {"talks/train.jsonl": lines([{"messages": messages}])})
    words = ["--no-track", "prepare", "corpus_v1", "--data", str(data), "--out", str(tmp_path / "out"), "--params"]
    recipe = data / "params.yaml"
    recipe.write_text("prepare: {corpora: {v1: {source: talks, test_rows: 0}}}\n", encoding="utf-8")
    refused(tmp_path, CliRunner().invoke(main, [*words, str(recipe)]), "talks: train: row 0: message 0 is ")


def test_chats_without_a_question_and_what_else_messages_carry_are_counted(tmp_path: Path) -> None:
    def chat(question: str, **more: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes.", **more}]}

    rows = [*(chat(f"Is it {n}?") for n in range(6)), chat(" "), chat("Is it so?", tool_calls=[{"id": "a"}])]
    done = prepare("talks", lay(tmp_path, {"talks.jsonl": lines(rows)}))
    assert done.exit_code == 0, done.output
    record = DatasetRecord.read(tmp_path / "out")
    assert record.decisions == {"empty": 1, "held_out": 2, "message_keys_not_used": 1}
    assert sum(record.rows.values()) == 7
    assert "1 messages have keys other than role and content" in done.stderr


def test_what_validation_and_test_both_ask_is_counted_and_kept(tmp_path: Path) -> None:
    asked = {**OWN[3], "prompt": "3  PLUS one is"}
    files = {"own/train.jsonl": OWN[4:], "own/validation.jsonl": [OWN[0], OWN[3]], "own/test.jsonl": [asked, OWN[1]]}
    done = prepare("own", lay(tmp_path, {name: lines(rows) for name, rows in files.items()}))
    assert done.exit_code == 0, done.output
    record = DatasetRecord.read(tmp_path / "out")
    assert record.decisions["overlap_asked"] == 1
    assert record.rows == {"train": 16, "validation": 2, "test": 2}
    assert "1 test rows have the question of a validation row: kept" in done.stderr


@pytest.mark.parametrize("source", ["x", "x+y", "y+x"])
def test_out_may_be_no_part_of_a_corpus(tmp_path: Path, source: str) -> None:
    files = {f"{name}/train.jsonl": lines([{"text": f"{name} {n}"} for n in range(4)]) for name in "xy"}
    data, recipe = lay(tmp_path, files), tmp_path / "params.yaml"
    recipe.write_text(f"prepare: {{corpora: {{v1: {{source: {source}, test_rows: 0}}}}}}\n", encoding="utf-8")
    words = ["prepare", "corpus_v1", "--data", str(data), "--out", str(data / "x"), "--force", "--params", str(recipe)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1, done.output
    assert "overlaps the input" in done.stderr
    assert (data / "x" / "train.jsonl").read_bytes() == files["x/train.jsonl"]


def test_a_task_named_like_a_release_is_kept_from_its_own_folder(tmp_path: Path) -> None:
    data, recipe = lay(tmp_path, {"v1/train.jsonl": lines(OWN), "tales.txt": b"a tale"}), tmp_path / "params.yaml"
    recipe.write_text("prepare: {corpora: {v1: {source: tales}}}\n", encoding="utf-8")
    words = ["prepare", "v1", "--data", str(data), "--out", str(data / "v1"), "--force", "--params", str(recipe)]
    done = CliRunner().invoke(main, words)
    assert "overlaps the input" in done.stderr
    assert (data / "v1" / "train.jsonl").read_bytes() == lines(OWN)
