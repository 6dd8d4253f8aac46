"""prepare: one dataset, generated, read or downloaded, checked, and written as parquet splits in the hub's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from portllm.checkpoint.files.hashing import file_digest
from portllm.checkpoint.files.output import refuse, staged
from portllm.checkpoint.record.records import DatasetRecord
from portllm.errors import DataError
from portllm.lm.data import corpora as real
from portllm.lm.data import preparing, sources, tables, tasks
from portllm.params import Params, PrepareParams
from portllm.world import corpora, datasets

Rows = Sequence[Mapping[str, Any]]
WORLD = "world"
CORPUS = "corpus_"
# the source of a release's text: the embedded world, prepare.corpora, or none (a real model)
Text = Literal["world", "corpora", "none"]


def run(*, dataset: str, out: Path, params: PrepareParams, text: Text = "world", force: bool = False) -> DatasetRecord:
    """Write `out/<split>.parquet` and dataset.json for one dataset: a task, or `corpus_<release>`.

    A task is the embedded world's, the harness's or a user's own; `text` is the source of a release's corpus where
    prepare.corpora has none. Raises DataError and EvaluationError, with nothing written.
    """
    refuse(out, force=force, inputs=())  # before anything is downloaded
    prepared = _make(dataset, params, text)
    with staged(out, force=force, inputs=_inputs(dataset, params)) as folder:
        prepared.write(folder)
        record = DatasetRecord(
            dataset=dataset,
            source=prepared.origin.source,
            revision=prepared.origin.revision,
            digests={split: file_digest(folder / f"{split}.parquet") for split in prepared.splits},
            rows={split: table.num_rows for split, table in prepared.splits.items()},
            files=prepared.origin.files,
            decisions=prepared.decisions,
        )
        record.write(folder)
    return record


def text_of(params: Params, dataset: str) -> Text:
    """Return the source of the text of the release in `corpus_<release>`; none where it is a real model."""
    release = dataset.removeprefix(CORPUS)
    if release in params.evolve.releases:
        real = params.evolve.releases[release].source is not None
    else:
        real = params.fetch.source not in ("world", "scratch")
    if real:
        return "none"
    return "world" if params.fetch.source == "world" else "corpora"


def check(dataset: str, splits: Mapping[str, Rows], *, repeats: bool = False) -> None:
    """Raise DataError where a split is empty, has a row of another one, or (unless `repeats`) a row twice."""
    seen: dict[str, str] = {}
    for split, rows in splits.items():
        if not rows:
            raise DataError(f"{dataset}: split {split} is empty; expected at least one row")
        for row in rows:
            key = repr(sorted((k, v) for k, v in row.items() if k != "idx"))
            if key in seen and not (repeats and seen[key] == split):
                raise DataError(f"{dataset}: a row of {split} is in {seen[key]}, too: {dict(row)}")
            seen[key] = split


def _inputs(dataset: str, params: PrepareParams) -> list[Path]:
    """Return the inputs under `params.data`, which OUT may not replace."""
    if dataset in datasets.TASKS:
        return []
    names = [dataset]
    if dataset.startswith(CORPUS):
        recipe = params.corpora.get(dataset.removeprefix(CORPUS))
        names = real.joined(recipe.source) if recipe else []
    data = Path(params.data)
    return [data / name for name in names if sources.here(data, name)]


def _make(dataset: str, params: PrepareParams, text: Text) -> preparing.Prepared:
    if dataset in datasets.TASKS:
        rows = datasets.rows(dataset, seed=params.seed, train_rows=params.train_rows, test_rows=params.test_rows)
        return _world(dataset, rows)
    if dataset.startswith(CORPUS):
        return _corpus(dataset, params, text)
    _expect_data(params)
    return preparing.task(dataset, params)


def _expect_data(params: PrepareParams) -> None:
    """Raise DataError where a folder of data other than the default is named and does not exist."""
    if params.data != PrepareParams().data:
        tasks.expect_folder(Path(params.data))


def _corpus(dataset: str, params: PrepareParams, text: Text) -> preparing.Prepared:
    release = dataset.removeprefix(CORPUS)
    recipe = params.corpora.get(release)
    if recipe is not None:
        _expect_data(params)
        return real.corpus(release, recipe, Path(params.data), params.seed)
    if text == "none":
        return preparing.Prepared(splits={}, origin=sources.Loaded(splits={}, source="none"))
    number = release.removeprefix("v")
    if text == "corpora" or not (release.startswith("v") and number.isdecimal()):
        raise DataError(
            f"{dataset}: release {release} has no text; name its source in prepare.corpora.{release} "
            f"(the embedded world's are {CORPUS}v0, {CORPUS}v1, …)"
        )
    splits = corpora.corpus(int(number), seed=params.seed, documents=params.documents)
    return _world(dataset, {**splits, "probe": _probes(params)}, repeats=True)


def _world(dataset: str, rows: Mapping[str, Rows], *, repeats: bool = False) -> preparing.Prepared:
    check(dataset, rows, repeats=repeats)
    splits = {split: tables.of_rows(some, where=f"{dataset}: {split}") for split, some in rows.items()}
    return preparing.Prepared(splits=splits, origin=sources.Loaded(splits=splits, source=WORLD))


def _probes(params: PrepareParams) -> Rows:
    """Return the probes of all tasks, in the corpora's words: a base is probed before any patch is trained."""
    return [
        {"task": task, "prompt": prompt, "answer": answer}
        for task in datasets.TASKS
        for prompt, answer in corpora.probes(task, seed=params.seed)
    ]
