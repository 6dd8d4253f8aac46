"""Tables as people bring them (parquet, jsonl, csv, plain text), read strictly: what is wrong has a line number."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.files.hashing import file_digest
from portllm.errors import DataError

if TYPE_CHECKING:
    from pyarrow import Table

ENDINGS = (".parquet", ".jsonl", ".csv", ".txt")
TEXT = "text"
_LONGEST_FIELD = 1 << 30  # bytes; csv's own limit of 128 KiB is shorter than many a text


@dataclass(frozen=True)
class Read:
    """A file's rows, its sha256, and how many byte order marks were taken off its beginning (0 or 1)."""

    table: Table
    digest: str
    marks: int = 0


def read(path: Path) -> Read:
    """The rows of a file, by its ending. Raises DataError for what is broken, ragged, not UTF-8 or without rows."""
    readers = {".parquet": _parquet, ".jsonl": _jsonl, ".csv": _csv, ".txt": _documents}
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: expected a file ending in {', '.join(ENDINGS)}")
    try:
        table, marks = reader(path)
        digest = file_digest(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not table.num_rows:
        raise DataError(f"{path}: has no rows; expected at least one")
    names = table.column_names
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: has two columns named {twice[0]}; rename one")
    return Read(table, digest, marks)


def write(path: Path, table: Table) -> None:
    """`table` as parquet; the same table gives the same bytes. Raises DataError for what parquet cannot hold."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(table, path, compression="zstd")
    except pa.ArrowException as error:
        # objects without a key, say
        raise DataError(f"{path.stem}: parquet cannot hold it ({first_line(error)}); leave the column out") from error


def of_rows(rows: Sequence[Mapping[str, Any]], *, where: str) -> Table:
    """Rows as a table: a column lacking in a row is null there. Raises DataError when a column mixes types."""
    import pyarrow as pa

    columns = dict.fromkeys(name for row in rows for name in row)
    made = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        try:
            made[name] = pa.array(values)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise DataError(f"{where}: {_odd_one(name, values, error)}") from error
    return pa.table(made)


def _parquet(path: Path) -> tuple[Table, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
        table.validate(full=True)  # text that is no UTF-8, say
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"{path}: not a readable parquet file ({first_line(error)}); replace it") from error
    return table, 0


def _jsonl(path: Path) -> tuple[Table, int]:
    rows = []
    lines, marks = _lines(path)
    for number, line in lines:
        if line.strip():
            rows.append(_object(line, f"{path}: line {number}"))
    return of_rows(rows, where=str(path)), marks


def _csv(path: Path) -> tuple[Table, int]:
    import pyarrow as pa

    text, marks = _text(path)
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    try:
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                raise DataError(
                    f"{path}: line {reader.line_num} has {len(row)} fields, the header names {len(header)}; "
                    "quote what holds a comma"
                )
            rows += [row] if row else []
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not valid CSV ({error}); mend it") from error
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}: has two columns named {twice[0]}; rename one")
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    return pa.table({n: pa.array(column, pa.string()) for n, column in zip(header, columns, strict=True)}), marks


def _documents(path: Path) -> tuple[Table, int]:
    """Plain text: documents parted by blank lines."""
    import pyarrow as pa

    text, marks = _text(path)
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            documents[-1].append(line.rstrip("\r"))
        elif documents[-1]:
            documents.append([])
    return pa.table({TEXT: pa.array(["\n".join(lines) for lines in documents if lines], pa.string())}), marks


def _text(path: Path) -> tuple[str, int]:
    lines, marks = _lines(path)
    return "\n".join(line for _, line in lines), marks


def _lines(path: Path) -> tuple[Iterator[tuple[int, str]], int]:
    """(the lines with their numbers, from 1; whether a byte order mark was taken off)."""
    data = path.read_bytes()
    mark = data.startswith(codecs.BOM_UTF8)
    return _decoded(data.removeprefix(codecs.BOM_UTF8), path), int(mark)


def _decoded(data: bytes, path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} at {error.start}"
            raise DataError(f"{path}: line {number} is not UTF-8 ({byte}); save the file as UTF-8") from error


def _object(line: str, where: str) -> dict[str, Any]:
    def distinct(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{where} has the key {twice[0]!r} twice; keep one")
        return dict(items)

    def never(constant: str) -> float:
        raise DataError(f"{where} holds {constant}, which is no JSON; leave it out")

    try:
        row = json.loads(line, object_pairs_hook=distinct, parse_constant=never)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
        raise DataError(f"{where} is not valid JSON ({first_line(error)}); a row is one object on one line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}; expected an object with a key per column")
    return row


def _odd_one(name: str, values: Sequence[Any], error: Exception) -> str:
    """What is wrong with a column that has no one type: the first row that differs."""
    kinds = [type(value) for value in values]
    first = next((kind for kind in kinds if kind is not type(None)), None)
    for number, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        if kind not in (first, type(None)) and first is not None:
            return f"column {name}: row {number} is {value!r:.60}, a {kind.__name__}, those before are {first.__name__}"
    return f"column {name} cannot be kept as a table ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """What an error says in its first line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a parquet file. Raises DataError when it cannot be read or lacks one of `columns`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); make it with `portllm prepare`") from error
    if missing := [c for c in columns if c not in table.column_names]:
        found = ", ".join(table.column_names)
        raise DataError(f"{path}: lacks the column {missing[0]}; expected {', '.join(columns)}, found {found}")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
