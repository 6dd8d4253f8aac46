"""Read and check the results on disk: scores with samples, training curves, release records; apart from them, costs.

Results of tasks and releases that params.yaml does not name are left out; `orphans` names them.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.checkpoint.record.records import ReleaseRecord
from portllm.errors import DataError
from portllm.params import Params

SAMPLE_COLUMNS = ("task", "arm", "patch_task", "doc_id", "correct")

# (task, arm, task of the patch or None for the bare release): one row of an evaluation
RowKey = tuple[str, str, "str | None"]


@dataclass(frozen=True, kw_only=True)
class ReleaseScores:
    """The scores of one release, by row.

    `metrics` are lm-eval's; `counts` are examples; `correct` maps each document to whether its answer was right.
    A patch trained on the release is the arm `tuned` on the first release and `retuned` on later ones.
    """

    release: str
    metrics: Mapping[RowKey, Mapping[str, float]]
    counts: Mapping[RowKey, int]
    correct: Mapping[RowKey, Mapping[int, bool]]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and memory of one stage execution, as `--cost` wrote them; None where a value was not measured."""

    stage: str
    release: str | None
    task: str | None
    wall_seconds: float
    peak_rss_bytes: int | None
    trainable_parameters: int | None
    peak_cuda_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """Training loss of one patch by optimisation step."""

    release: str
    task: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Results:
    """All results that the report is computed from, except the weights themselves."""

    releases: tuple[str, ...]
    tasks: tuple[str, ...]
    scores: Mapping[str, ReleaseScores]
    records: Mapping[str, ReleaseRecord | None]
    curves: tuple[TrainingCurve, ...]

    @property
    def first(self) -> str:
        """Return the release the patches were trained on."""
        return self.releases[0]


def read(*, params: Params, models: Path, evaluated: Path) -> Results:
    """Read the results of `params.releases` × `params.tasks`. Raises DataError, which names the file and its stage."""
    require_names(params)
    first = params.releases[0]
    return Results(
        releases=params.releases,
        tasks=params.tasks,
        scores={
            name: read_scores(evaluated, name, first=name == first, tasks=params.tasks) for name in params.releases
        },
        records={name: _release_record(models / "releases" / name) for name in params.releases},
        curves=tuple(_curves(models / "patches", params)),
    )


def orphans(*, params: Params, models: Path, evaluated: Path) -> tuple[Path, ...]:
    """Return the patches, ported models, releases and evaluations on disk that `params` does not name."""
    releases = (path for path in (models / "releases").glob("[!.]*") if path.is_dir())
    rows = (path for kind in ("patches", "ported") for path in (models / kind).glob("[!.]*/[!.]*") if path.is_dir())
    files = evaluated.glob("[!.]*.json")
    return (
        *(path for path in sorted(releases) if path.name not in params.releases),
        *(p for p in sorted(rows) if p.parent.name not in params.releases or p.name not in params.tasks),
        *(path for path in sorted(files) if path.stem not in params.releases),
    )


def require_names(params: Params) -> None:
    """Raise DataError unless params names a task and a release."""
    if not params.releases or not params.tasks:
        raise DataError("params: releases and tasks must each name at least one to report on; fill them in")


def missing(path: Path, stage: str) -> DataError:
    """Return the error for an input that does not exist."""
    return DataError(f"{path}: not found; the stage {stage} writes it, run `dvc repro {stage}`")


def read_scores(folder: Path, release: str, *, first: bool, tasks: Collection[str]) -> ReleaseScores:
    """Read `folder`/`release`.json with its samples, without patches for other than `tasks`. Raises DataError."""
    path = folder / f"{release}.json"
    tree = _json(path, "evaluate")
    metrics: dict[RowKey, Mapping[str, float]] = {}
    counts: dict[RowKey, int] = {}
    try:
        for row in tree["results"]:
            if (row["patch_task"] or None) not in (None, *tasks):
                continue
            key = _row_key(row["task"], row["arm"], row["patch_task"], first=first)
            if key in metrics:
                raise DataError(f"{path}: two results for {_spell(key)}; run `dvc repro evaluate` again")
            metrics[key] = {name: float(value) for name, value in row["metrics"].items() if _finite(value)}
            counts[key] = int(row["samples"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not an evaluation of ours ({error!r}); run `dvc repro evaluate` again") from error
    correct = _samples(folder / f"{release}.samples.parquet", first=first)
    return ReleaseScores(release=release, metrics=metrics, counts=counts, correct=correct)


def read_costs(folder: Path) -> tuple[Cost, ...]:
    """Read every cost file below `folder`. Raises DataError where there is none, or one is not a cost file."""
    paths = sorted(folder.rglob("*.json"))
    if not paths:
        raise DataError(
            f"{folder}: contains no cost file; `dvc repro` writes one for each stage that it runs, none for a "
            "stage that it restores from its cache"
        )
    return tuple(_cost(path) for path in paths)


def _cost(path: Path) -> Cost:
    tree = _json(path, "of its folder's name")
    try:
        return Cost(
            stage=str(tree["stage"]),
            release=tree.get("release"),
            task=tree.get("task"),
            wall_seconds=float(tree["wall_seconds"]),
            peak_rss_bytes=tree.get("peak_rss_bytes"),
            trainable_parameters=tree.get("trainable_parameters"),
            peak_cuda_bytes=tree.get("peak_cuda_bytes"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a cost file of ours ({error!r}); delete it and run `dvc repro` again") from error


def _curve(path: Path, *, release: str, task: str) -> TrainingCurve:
    """Read a history.csv with columns step and loss. Raises DataError."""
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(lines) if row["loss"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: expected columns step and loss ({error!r}); run `dvc repro train` again") from error
    return TrainingCurve(release=release, task=task, steps=tuple(s for s, _ in rows), losses=tuple(v for _, v in rows))


def _samples(path: Path, *, first: bool) -> dict[RowKey, dict[int, bool]]:
    import pyarrow
    import pyarrow.parquet

    if not path.exists():
        raise missing(path, "evaluate")
    try:
        rows = pyarrow.parquet.read_table(path, columns=list(SAMPLE_COLUMNS)).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{path}: not readable as samples ({text}); run `dvc repro evaluate` again") from error
    if absent := [name for name in SAMPLE_COLUMNS if name not in rows]:
        raise DataError(f"{path}: lacks the columns {', '.join(absent)}; run `dvc repro evaluate` again")
    correct: dict[RowKey, dict[int, bool]] = {}
    for task, arm, patch_task, doc, right in zip(*(rows[name] for name in SAMPLE_COLUMNS), strict=True):
        key = _row_key(task, arm, patch_task, first=first)
        answers = correct.setdefault(key, {})
        if doc in answers:
            raise DataError(f"{path}: two samples of document {doc} for {_spell(key)}; run `dvc repro evaluate` again")
        answers[doc] = bool(right)
    return correct


def _row_key(task: str, arm: str, patch_task: str | None, *, first: bool) -> RowKey:
    return task, "retuned" if arm == "tuned" and not first else arm, patch_task or None


def _spell(key: RowKey) -> str:
    task, arm, patch_task = key
    return f"{task}, arm {arm}" + (f", patch for {patch_task}" if patch_task else "")


def _release_record(folder: Path) -> ReleaseRecord | None:
    # a release copied without portllm has no record: its probe is then unknown, and the report says so
    return ReleaseRecord.read(folder) if (folder / ReleaseRecord.FILE).exists() else None


def _curves(patches: Path, params: Params) -> Iterator[TrainingCurve]:
    for task in params.tasks:
        for release in params.releases:
            path = patches / release / task / "history.csv"
            if path.exists():
                yield _curve(path, release=release, task=task)


def _json(path: Path, stage: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise missing(path, stage) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({error}); run the stage {stage} again") from error


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
