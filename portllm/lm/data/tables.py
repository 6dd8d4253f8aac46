"""Tables in files (parquet, jsonl, csv, plain text), read strictly: an error names the line."""

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
_LONGEST_FIELD = 1 << 30  # bytes; the csv module's own limit is 128 KiB, less than many texts have


@dataclass(frozen=True)
class Read:
    """A file's rows, its digest, and the number of byte order marks removed from its start (0 or 1)."""

    table: Table
    digest: str
    marks: int = 0


def read(path: Path) -> Read:
    """Read a file by its ending. Raises DataError where it is broken, ragged, not UTF-8 or without rows."""
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
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: has two columns named {repeated[0]}; rename one")
    return Read(table, digest, marks)


def write(path: Path, table: Table) -> None:
    """Write `table` as parquet; equal tables give equal bytes. Raises DataError where parquet cannot store it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(table, path, compression="zstd")
    except pa.ArrowException as error:
        # such as objects without a key
        raise DataError(f"{path.stem}: parquet cannot store it ({first_line(error)}); leave the column out") from error


def of_rows(rows: Sequence[Mapping[str, Any]], *, where: str) -> Table:
    """Return rows as a table; a missing value is null. Raises DataError where a column mixes types."""
    import pyarrow as pa

    columns = dict.fromkeys(name for row in rows for name in row)
    arrays = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise DataError(f"{where}: {_odd_one(name, values, error)}") from error
    return pa.table(arrays)


def _parquet(path: Path) -> tuple[Table, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
        table.validate(full=True)  # such as text that is not UTF-8
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
        raise DataError(f"{path}: line {reader.line_num} is not valid CSV ({error}); correct it") from error
    if repeated := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}: has two columns named {repeated[0]}; rename one")
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    return pa.table({n: pa.array(column, pa.string()) for n, column in zip(header, columns, strict=True)}), marks


def _documents(path: Path) -> tuple[Table, int]:
    """Read plain text: documents separated by blank lines."""
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
    """Return the lines with their numbers, from 1, and whether a byte order mark was removed."""
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
        if repeated := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{where} has the key {repeated[0]!r} twice; keep one")
        return dict(items)

    def refuse(constant: str) -> float:
        raise DataError(f"{where} holds {constant}, which is not JSON; leave it out")

    try:
        row = json.loads(line, object_pairs_hook=distinct, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
        raise DataError(f"{where} is not valid JSON ({first_line(error)}); a row is one object on one line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}; expected an object with a key per column")
    return row


def _odd_one(name: str, values: Sequence[Any], error: Exception) -> str:
    """Return the error of a column without one type: the first row of another type."""
    kinds = [type(value) for value in values]
    first = next((kind for kind in kinds if kind is not type(None)), None)
    for number, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        if kind not in (first, type(None)) and first is not None:
            return f"column {name}: row {number} is {value!r:.60}, a {kind.__name__}, those before are {first.__name__}"
    return f"column {name} cannot be stored as a table ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; its type where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a parquet file. Raises DataError where it cannot be read or lacks one of `columns`."""
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
