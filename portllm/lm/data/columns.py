"""The columns of the paper's seven tasks, on the hub and in the harness."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import DataError

if TYPE_CHECKING:
    from pyarrow import Table

_WHOLE = re.compile(r"-?\d{1,9}", re.ASCII)
SEVEN = ("boolq", "sst2", "mrpc", "rte", "wnli", "winogrande", "gsm8k")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a task: text, `label` from 0 to `labels`-1, and columns with one of a few words."""

    text: tuple[str, ...]
    labels: int = 0
    words: Mapping[str, tuple[str, ...]] | None = None


_PAIRS = Columns(text=("sentence1", "sentence2"), labels=2)
KNOWN: Mapping[str, Columns] = {
    "boolq": Columns(text=("question", "passage"), labels=2),
    "sst2": Columns(text=("sentence",), labels=2),
    "mrpc": _PAIRS,
    "rte": _PAIRS,
    "wnli": _PAIRS,
    "winogrande": Columns(text=("sentence", "option1", "option2"), words={"answer": ("1", "2")}),
    "gsm8k": Columns(text=("question", "answer")),
}


def fit(name: str, table: Table, *, where: str) -> Table:
    """Return `table` in the columns of the harness's task; a table of an unknown task stays as it is.

    google/boolq's `answer` becomes super_glue's `label` (and `idx` is added); labels in text form (CSV) become
    numbers. Raises DataError for a missing column, a null, a wrong type or label.
    """
    if name not in KNOWN:
        return table
    task = KNOWN[name]
    table = _boolq(table) if name == "boolq" else table
    expected = [*task.text, *(["label"] if task.labels else []), *(task.words or {})]
    if missing := [column for column in expected if column not in table.column_names]:
        found = ", ".join(table.column_names)
        raise DataError(f"{where}: lacks the column {missing[0]}; {name} has {', '.join(expected)}, found {found}")
    for column in (*task.text, *(task.words or {})):
        expect_text(table, column, where)
    for column, words in (task.words or {}).items():
        _expect_one_of(table, column, words, where)
    if task.labels:
        table = _numbers(table, "label")
        _expect_label(table, task.labels, where)
    return table


def adaptation(name: str, path: Path) -> dict[str, Any]:
    """Return the fields that let a definition read `path` as it is, with boolq's `answer` in place of `label`."""
    import pyarrow.parquet as pq

    if name != "boolq" or path.suffix != ".parquet" or "label" in pq.ParquetFile(path).schema_arrow.names:
        return {}
    return {"process_docs": _labelled}


def _labelled(rows: Any) -> Any:
    """Return the harness's rows with a label derived from the answer, true or false."""
    return rows.add_column("label", [int(answer) for answer in rows["answer"]]) if "answer" in rows.features else rows


def expect_text(table: Table, column: str, where: str) -> None:
    """Raise DataError where a value of `column` is not text."""
    for number, value in enumerate(table.column(column).to_pylist()):
        if not isinstance(value, str):
            raise DataError(f"{where}: row {number}: {column} is {_shown(value)}, expected text")


def _boolq(table: Table) -> Table:
    import pyarrow as pa

    names = table.column_names
    if "label" in names or "answer" not in names:
        return table
    answers = table.column("answer").to_pylist()
    labels_of = {True: 1, False: 0, "true": 1, "false": 0, "True": 1, "False": 0}
    labels = [labels_of.get(answer, answer) if isinstance(answer, (bool, str)) else answer for answer in answers]
    if not all(isinstance(label, int) for label in labels):
        return table  # unchanged: the check that follows raises the error
    kept = table.drop_columns(["answer"])
    rows = pa.array(range(table.num_rows), pa.int32())
    kept = kept if "idx" in names else kept.append_column("idx", rows)
    return _plain(kept).append_column("label", pa.array(labels, pa.int64()))


def _plain(table: Table) -> Table:
    # the hub's metadata about the columns no longer applies
    return table.replace_schema_metadata(None)


def _numbers(table: Table, column: str) -> Table:
    import pyarrow as pa

    values = table.column(column).to_pylist()
    if not all(isinstance(value, str) and _WHOLE.fullmatch(value.strip()) for value in values):
        return table
    place = table.column_names.index(column)
    return _plain(table).set_column(place, column, pa.array([int(value) for value in values], pa.int64()))


def _expect_one_of(table: Table, column: str, words: tuple[str, ...], where: str) -> None:
    for number, value in enumerate(table.column(column).to_pylist()):
        if value not in words:
            raise DataError(f"{where}: row {number}: {column} is {value!r:.60}, expected one of {', '.join(words)}")


def _expect_label(table: Table, count: int, where: str) -> None:
    for number, value in enumerate(table.column("label").to_pylist()):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            hint = " (-1 hides a label)" if value == -1 else ""
            raise DataError(f"{where}: row {number}: label is {_shown(value)}{hint}, expected 0 to {count - 1}")


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.60}"
