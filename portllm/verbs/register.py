"""register: decide which ported models beat their release's base arm, and under which names to register them.

This verb decides and writes the decisions; the command line sends the accepted models to the model registry.
A decision needs records only: port.json and the results of `evaluate`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.checkpoint.files.output import staged_file
from portllm.checkpoint.record.provenance import public_name
from portllm.checkpoint.record.records import SCHEMA_VERSION, PortRecord, dumps
from portllm.errors import CheckpointError, EvaluationError, ParamsError
from portllm.lm.scoring.scored import expect_rows, main_metric
from portllm.params import RegisterParams

# metrics of which more is better; no decision rests on perplexity alone
_HIGHER_IS_BETTER = ("acc,", "exact_match,")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One ported model: its name in the registry, whether it is accepted, and why. Scores are shares, 0..1."""

    name: str
    task: str
    path: str
    accepted: bool
    reason: str
    metric: str
    ported_score: float
    base_score: float
    samples: int
    fingerprint: str
    base_fingerprint: str
    patch_fingerprint: str | None


@dataclass(frozen=True, kw_only=True)
class RegisterRecord:
    """The decisions on one release's ported models, in the order of their tasks."""

    schema_version: int = SCHEMA_VERSION
    release: str
    alias: str
    margin: float
    decisions: tuple[Decision, ...]

    @property
    def accepted(self) -> tuple[Decision, ...]:
        """The decisions for a model, which the registry receives."""
        return tuple(decision for decision in self.decisions if decision.accepted)


def run(
    *,
    ported: Path,
    results: Path,
    params: RegisterParams,
    tasks: Collection[str] = (),
    releases: Collection[str] = (),
    out: Path | None = None,
    on_note: Callable[[str], object] = lambda _: None,
) -> RegisterRecord:
    """Decide on `ported`, one ported model or a directory of them, by `results`; write the record to `out`.

    A model is accepted when its main metric exceeds that of the bare release by more than `params.margin`. Where
    `tasks` or `releases` names any, a directory's models of other tasks and of another release are left out, each with
    a note: they are left from an earlier params.yaml. Raises CheckpointError, ParamsError, and EvaluationError when the
    results are of other tensors.
    """
    scores = _read(results)
    if releases and scores["release"] not in releases:
        on_note(f"{ported}: left out, since `releases` does not name {scores['release']}; remove or add it")
        models = []
    else:
        models = _ported(ported, tasks, on_note)
    decisions = tuple(_decide(path, scores, params, results) for path in models)
    names = {decision.name for decision in decisions}
    if len(names) < len(decisions):
        raise ParamsError(f"register.name {params.name!r} gives several models one name; put {{task}} into it")
    record = RegisterRecord(release=scores["release"], alias=params.alias, margin=params.margin, decisions=decisions)
    if out is not None:
        with staged_file(out) as partial:
            partial.write_text(dumps(dataclasses.asdict(record)), encoding="utf-8")
    return record


def _ported(path: Path, tasks: Collection[str], on_note: Callable[[str], object]) -> list[Path]:
    """Return `path` where it is a ported model, else the ported models of `tasks` in it. Raises CheckpointError."""
    if (path / PortRecord.FILE).is_file():
        return [path]
    inside = {file.parent: PortRecord.read(file.parent) for file in sorted(path.glob(f"*/{PortRecord.FILE}"))}
    if not inside:
        raise CheckpointError(f"{path}: neither a ported model (port.json) nor a directory of them; run portllm port")
    orphans = [folder for folder, record in inside.items() if tasks and record.task and record.task not in tasks]
    for folder in orphans:
        on_note(f"{folder}: left out, since `tasks` does not name {inside[folder].task}; remove or add it")
    return [folder for folder in inside if folder not in orphans]


def _decide(path: Path, scores: Mapping[str, Any], params: RegisterParams, results: Path) -> Decision:
    port = PortRecord.read(path)
    if port.base.fingerprint != scores["model"]["fingerprint"]:
        raise EvaluationError(f"{results}: scores of another base than the one {path} was ported onto; evaluate again")
    ported_row = _row(scores, path, results, arm="ported", fingerprint=port.fingerprint)
    task = ported_row["task"]
    base_row = _row(scores, path, results, arm="base", fingerprint=None, task=task)
    metric = main_metric(ported_row["metrics"])
    if not metric.startswith(_HIGHER_IS_BETTER) or metric not in base_row["metrics"]:
        raise EvaluationError(f"{results}: {task} has no accuracy or exact match for both arms; found {metric}")
    score, floor = ported_row["metrics"][metric], base_row["metrics"][metric]
    accepted = score > floor + params.margin
    return Decision(
        name=_name(params.name, task, scores["release"]),
        task=task,
        path=public_name(path),
        accepted=accepted,
        reason=_reason(score, floor, params.margin, accepted),
        metric=metric,
        ported_score=score,
        base_score=floor,
        samples=ported_row["samples"],
        fingerprint=ported_row["patch_fingerprint"],
        base_fingerprint=scores["model"]["fingerprint"],
        patch_fingerprint=port.patch.fingerprint,
    )


def _row(
    scores: Mapping[str, Any], path: Path, results: Path, *, arm: str, fingerprint: str | None, task: str | None = None
) -> Mapping[str, Any]:
    """Return the one result of `arm`: of the model with this fingerprint on its own task, or of the base on `task`."""
    rows: list[Mapping[str, Any]] = scores["results"]
    for row in rows:
        is_its_task = row["task"] == row["patch_task"] if task is None else row["task"] == task
        if is_its_task and row["arm"] == arm and row["patch_fingerprint"] == fingerprint:
            return row
    what = f"no score of {path} as it is now on its own task" if task is None else f"no score of the base on {task}"
    raise EvaluationError(f"{results}: {what}; run portllm evaluate on its release with --patch {path}")


def _read(results: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(results.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EvaluationError(f"{results}: not found; run portllm evaluate first") from error
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{results}: not readable JSON ({error}); run portllm evaluate again") from error
    keys = {"release", "model", "results"}
    if not isinstance(tree, dict) or tree.get("schema_version") != SCHEMA_VERSION or not keys <= set(tree):
        raise EvaluationError(f"{results}: not results of this version's evaluate; run portllm evaluate again")
    expect_rows(tree["results"], results)
    return tree


def _name(template: str, task: str, release: str) -> str:
    try:
        return template.format(task=task, release=release)
    except (KeyError, IndexError, ValueError) as error:
        raise ParamsError(
            f"register.name {template!r} may contain {{task}} and {{release}}, no other braces"
        ) from error


def _reason(score: float, floor: float, margin: float, accepted: bool) -> str:
    above = f" by more than {margin:g}" if margin else ""
    return f"ported {score:.4f} is {'' if accepted else 'not '}above base {floor:.4f}{above}"
