"""prepare: one dataset, made or fetched, checked and written as parquet splits in the hub's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portllm.checkpoint.fingerprint import file_digest
from portllm.checkpoint.output import staged
from portllm.checkpoint.records import DatasetRecord
from portllm.errors import DataError
from portllm.params import PrepareParams
from portllm.world import corpora, datasets

Rows = Sequence[Mapping[str, Any]]
CORPUS = "corpus_v"


def run(*, dataset: str, out: Path, params: PrepareParams, force: bool = False) -> DatasetRecord:
    """Write `out/<split>.parquet` for one dataset of the embedded world: a task, or `corpus_vN`.

    Raises DataError for an unknown name, and when a split is empty or shares a row with another.
    """
    splits = _generate(dataset, params)
    check(dataset, splits, repeats=dataset.startswith(CORPUS))
    with staged(out, force=force) as folder:
        for split, rows in splits.items():
            _write(folder / f"{split}.parquet", rows)
        digests = {split: file_digest(folder / f"{split}.parquet") for split in splits}
    return DatasetRecord(dataset=dataset, digests=digests, rows={s: len(r) for s, r in splits.items()})


def check(dataset: str, splits: Mapping[str, Rows], *, repeats: bool = False) -> None:
    """Raise DataError when a split is empty, shares a row with another, or (unless `repeats`) holds one twice."""
    seen: dict[str, str] = {}
    for split, rows in splits.items():
        if not rows:
            raise DataError(f"{dataset}: split {split} is empty; expected at least one row")
        for row in rows:
            key = repr(sorted((k, v) for k, v in row.items() if k != "idx"))
            if key in seen and not (repeats and seen[key] == split):
                raise DataError(f"{dataset}: a row of {split} stands in {seen[key]} too: {dict(row)}")
            seen[key] = split


def _generate(dataset: str, params: PrepareParams) -> Mapping[str, Rows]:
    if dataset in datasets.TASKS:
        return datasets.rows(dataset, seed=params.seed, train_rows=params.train_rows, test_rows=params.test_rows)
    number = dataset.removeprefix(CORPUS)
    if dataset.startswith(CORPUS) and number.isdecimal():
        splits = corpora.corpus(int(number), seed=params.seed, documents=params.documents)
        return {**splits, "probe": _probes(params)}
    raise DataError(f"{dataset}: not a dataset of the embedded world; known: {', '.join(datasets.TASKS)}, {CORPUS}N")


def _probes(params: PrepareParams) -> Rows:
    """What the tasks ask about, in the corpora's own words: a release is asked it before any patch is made."""
    return [
        {"task": task, "prompt": prompt, "answer": answer}
        for task in datasets.TASKS
        for prompt, answer in corpora.probes(task, seed=params.seed)
    ]


def _write(path: Path, rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([dict(r) for r in rows]), path, compression="zstd")
