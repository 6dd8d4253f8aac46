"""register: which ported models beat their release's base arm, and under which names the registry is to know them.

This verb only decides, and writes the decisions down; the command line hands the accepted ones to the
model registry. Deciding needs nothing but records: port.json and what `evaluate` wrote.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.checkpoint.output import staged_file
from portllm.checkpoint.provenance import public_name
from portllm.checkpoint.records import SCHEMA_VERSION, PortRecord, dumps
from portllm.errors import CheckpointError, EvaluationError, ParamsError
from portllm.lm.scoring.scored import expect_rows, main_metric
from portllm.params import RegisterParams

# where more of the metric is better; a patch is never judged by perplexity alone
_HIGHER_IS_BETTER = ("acc,", "exact_match,")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One ported model: its name in the registry, whether it goes there, and why. Scores are shares, 0..1."""

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
        """Those that the registry is to know."""
        return tuple(one for one in self.decisions if one.accepted)


def run(*, ported: Path, results: Path, params: RegisterParams, out: Path | None = None) -> RegisterRecord:
    """Judge `ported`, one ported checkpoint or a directory of them, by `results`; write the record to `out`.

    A model is accepted when its main metric is above that of the bare release by more than `params.margin`.
    Raises CheckpointError, EvaluationError when the results are not of these very models, ParamsError.
    """
    scores = _read(results)
    decisions = tuple(_decide(path, scores, params, results) for path in _ported(ported))
    names = [one.name for one in decisions]
    if len(set(names)) < len(names):
        raise ParamsError(f"register.name {params.name!r} names several models alike; put {{task}} into it")
    record = RegisterRecord(release=scores["release"], alias=params.alias, margin=params.margin, decisions=decisions)
    if out is not None:
        with staged_file(out) as partial:
            partial.write_text(dumps(dataclasses.asdict(record)), encoding="utf-8")
    return record


def _ported(path: Path) -> list[Path]:
    if (path / PortRecord.FILE).is_file():
        return [path]
    inside = sorted(p.parent for p in path.glob(f"*/{PortRecord.FILE}"))
    if not inside:
        raise CheckpointError(f"{path}: neither a ported model (port.json) nor a directory of them; run portllm port")
    return inside


def _decide(path: Path, scores: Mapping[str, Any], params: RegisterParams, results: Path) -> Decision:
    port = PortRecord.read(path)
    if port.base.fingerprint != scores["model"]["fingerprint"]:
        raise EvaluationError(f"{results}: scores of another base than the one {path} was ported onto; evaluate again")
    mine = _row(scores, path, results, arm="ported", fingerprint=port.fingerprint)
    task = mine["task"]
    bare = _row(scores, path, results, arm="base", fingerprint=None, task=task)
    metric = main_metric(mine["metrics"])
    if not metric.startswith(_HIGHER_IS_BETTER) or metric not in bare["metrics"]:
        raise EvaluationError(f"{results}: {task} has no accuracy or exact match for both arms; found {metric}")
    score, floor = mine["metrics"][metric], bare["metrics"][metric]
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
        samples=mine["samples"],
        fingerprint=mine["patch_fingerprint"],
        base_fingerprint=scores["model"]["fingerprint"],
        patch_fingerprint=port.patch.fingerprint,
    )


def _row(
    scores: Mapping[str, Any], path: Path, results: Path, *, arm: str, fingerprint: str | None, task: str | None = None
) -> Mapping[str, Any]:
    """The one result of `arm`: of the model with this fingerprint on its own task, or of the bare release on `task`."""
    for row in scores["results"]:
        own = row["task"] == row["patch_task"] if task is None else row["task"] == task
        if own and row["arm"] == arm and row["patch_fingerprint"] == fingerprint:
            found: Mapping[str, Any] = row
            return found
    what = f"no score of {path} as it is now on its own task" if task is None else f"no score of the base on {task}"
    raise EvaluationError(f"{results}: {what}; run portllm evaluate on its release with --patch {path}")


def _read(results: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(results.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EvaluationError(f"{results}: not there; run portllm evaluate first") from error
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{results}: not readable JSON ({error}); run portllm evaluate again") from error
    known = {"release", "model", "results"}
    if not isinstance(tree, dict) or tree.get("schema_version") != SCHEMA_VERSION or not known <= set(tree):
        raise EvaluationError(f"{results}: not what this portllm's evaluate writes; run portllm evaluate again")
    expect_rows(tree["results"], results)
    return tree


def _name(template: str, task: str, release: str) -> str:
    try:
        return template.format(task=task, release=release)
    except (KeyError, IndexError, ValueError) as error:
        raise ParamsError(f"register.name {template!r} may hold {{task}} and {{release}}, no other braces") from error


def _reason(score: float, floor: float, margin: float, accepted: bool) -> str:
    above = f" by more than {margin:g}" if margin else ""
    return f"ported {score:.4f} is {'' if accepted else 'not '}above base {floor:.4f}{above}"
