"""The results on disk, read and checked: evaluations with their samples, costs, histories, release records.

Only what belongs to the tasks and releases of params.yaml is read; `orphans` names the rest.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portllm.checkpoint.record.records import ReleaseRecord
from portllm.errors import DataError
from portllm.params import Params

SAMPLE_COLUMNS = ("task", "arm", "patch_task", "doc_id", "correct")

# (task, arm, task of the patch or None): one row of an evaluation
Key = tuple[str, str, "str | None"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One release's evaluation. A patch trained on the release is `tuned` on the first, `retuned` on later ones."""

    release: str
    metrics: Mapping[Key, Mapping[str, float]]
    counts: Mapping[Key, int]
    correct: Mapping[Key, Mapping[int, bool]]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one stage execution took; None where it was not measured."""

    stage: str
    release: str | None
    task: str | None
    wall_seconds: float
    peak_rss_bytes: int | None
    trainable_parameters: int | None
    peak_cuda_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Training loss of one patch over its steps."""

    release: str
    task: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything the report is computed from, except the weights themselves."""

    releases: tuple[str, ...]
    tasks: tuple[str, ...]
    evaluations: Mapping[str, Evaluation]
    records: Mapping[str, ReleaseRecord | None]
    curves: tuple[Curve, ...]
    costs: tuple[Cost, ...] = field(default=())

    @property
    def first(self) -> str:
        return self.releases[0]


def read(*, params: Params, models: Path, evaluated: Path, costs: Path) -> Evidence:
    """Return all results of `params.releases` × `params.tasks`. Raises DataError naming the file and its stage."""
    if not params.releases or not params.tasks:
        raise DataError("params: releases and tasks must each name at least one to report on; fill them in")
    first = params.releases[0]
    return Evidence(
        releases=params.releases,
        tasks=params.tasks,
        evaluations={
            name: read_evaluation(evaluated, name, first=name == first, tasks=params.tasks) for name in params.releases
        },
        records={name: _release_record(models / "releases" / name) for name in params.releases},
        curves=tuple(_curves(models / "patches", params)),
        costs=tuple(cost for path in sorted(costs.rglob("*.json")) if _is_named(cost := read_cost(path), params)),
    )


def orphans(*, params: Params, models: Path, evaluated: Path) -> tuple[Path, ...]:
    """Return the patches, ported models, releases and evaluations on disk that `params` names no more."""
    releases = (path for path in (models / "releases").glob("[!.]*") if path.is_dir())
    rows = (path for kind in ("patches", "ported") for path in (models / kind).glob("[!.]*/[!.]*") if path.is_dir())
    files = evaluated.glob("[!.]*.json")
    return (
        *(path for path in sorted(releases) if path.name not in params.releases),
        *(p for p in sorted(rows) if p.parent.name not in params.releases or p.name not in params.tasks),
        *(path for path in sorted(files) if path.stem not in params.releases),
    )


def missing(path: Path, stage: str) -> DataError:
    """The error for an input that is not there."""
    return DataError(f"{path}: not found; the stage {stage} makes it, run `dvc repro {stage}`")


def read_evaluation(folder: Path, release: str, *, first: bool, tasks: Collection[str]) -> Evaluation:
    """Return `folder`/`release`.json with its samples, without patches for other than `tasks`. Raises DataError."""
    path = folder / f"{release}.json"
    tree = _json(path, "evaluate")
    metrics: dict[Key, Mapping[str, float]] = {}
    counts: dict[Key, int] = {}
    try:
        for row in tree["results"]:
            if (row["patch_task"] or None) not in (None, *tasks):
                continue
            key = _key(row["task"], row["arm"], row["patch_task"], first=first)
            if key in metrics:
                raise DataError(f"{path}: two results for {_spell(key)}; run `dvc repro evaluate` again")
            metrics[key] = {name: float(value) for name, value in row["metrics"].items() if _finite(value)}
            counts[key] = int(row["samples"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not an evaluation of ours ({error!r}); run `dvc repro evaluate` again") from error
    correct = _samples(folder / f"{release}.samples.parquet", first=first)
    return Evaluation(release=release, metrics=metrics, counts=counts, correct=correct)


def read_cost(path: Path) -> Cost:
    """One cost file. Raises DataError."""
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


def read_curve(path: Path, *, release: str, task: str) -> Curve:
    """A history.csv with columns step and loss. Raises DataError."""
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(lines) if row["loss"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: expected columns step and loss ({error!r}); run `dvc repro train` again") from error
    return Curve(release=release, task=task, steps=tuple(s for s, _ in rows), losses=tuple(v for _, v in rows))


def _samples(path: Path, *, first: bool) -> dict[Key, dict[int, bool]]:
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
    correct: dict[Key, dict[int, bool]] = {}
    for task, arm, patch_task, doc, right in zip(*(rows[name] for name in SAMPLE_COLUMNS), strict=True):
        key = _key(task, arm, patch_task, first=first)
        answers = correct.setdefault(key, {})
        if doc in answers:
            raise DataError(f"{path}: two samples of document {doc} for {_spell(key)}; run `dvc repro evaluate` again")
        answers[doc] = bool(right)
    return correct


def _key(task: str, arm: str, patch_task: str | None, *, first: bool) -> Key:
    return task, "retuned" if arm == "tuned" and not first else arm, patch_task or None


def _spell(key: Key) -> str:
    task, arm, patch_task = key
    return f"{task}, arm {arm}" + (f", patch for {patch_task}" if patch_task else "")


def _is_named(cost: Cost, params: Params) -> bool:
    return cost.release in (None, *params.releases) and cost.task in (None, *params.tasks)


def _release_record(folder: Path) -> ReleaseRecord | None:
    # a release fetched without portllm has no record: the probe is then not known, and the report says so
    return ReleaseRecord.read(folder) if (folder / ReleaseRecord.FILE).exists() else None


def _curves(patches: Path, params: Params) -> list[Curve]:
    found = []
    for task in params.tasks:
        for release in params.releases:
            path = patches / release / task / "history.csv"
            if path.exists():
                found.append(read_curve(path, release=release, task=task))
    return found


def _json(path: Path, stage: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise missing(path, stage) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({error}); run the stage {stage} again") from error


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
