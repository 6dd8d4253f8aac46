"""Walk through the recorded runs: back to what an artifact was made from, and onward to what was made from it.

Both walks go from run to run by fingerprint: a run that wrote what another one read comes before it.
Only finished runs count, and of several runs that wrote the same tensors, the latest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from portllm.errors import TrackingError
from portllm.tracking import store
from portllm.tracking.messages import Artifact, Dataset, portions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


# hex digits of a fingerprint in a tag's name: enough to identify an artifact, few enough to read
_PREFIX = 16
# tags hold 8000 characters: about 55 artifacts
_ARTIFACTS_PER_TAG = 40


@dataclass(frozen=True)
class Step:
    """One artifact of a walk and the run that wrote it; `run` and the fields after it are empty without such a run."""

    artifact: Artifact
    run: str | None = None
    name: str = ""
    stage: str = ""
    commit: str | None = None
    reads: tuple[Artifact, ...] = ()
    datasets: tuple[Dataset, ...] = ()


def tags(direction: Literal["read", "write"], artifacts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return a run's tags for its artifacts (as JSON): one per fingerprint to search for, a few with the full list."""
    pairs = {f"portllm.{direction}.{one['fingerprint'][:_PREFIX]}": one["name"] for one in artifacts}
    for number, part in enumerate(portions(artifacts, _ARTIFACTS_PER_TAG), start=1):
        pairs[_list_tag(direction, number)] = json.dumps(part)
    return pairs


def lineage(model: str, version: str | int, *, root: Path) -> list[Step]:
    """Return all that a registered model version was made from: itself first, then breadth-first to data and bases.

    Raises TrackingError when the registry has no such version, or one that portllm did not register.
    """
    from mlflow.exceptions import MlflowException

    client = store.connect(root)
    try:
        version_tags = client.get_model_version(model, str(version)).tags
    except MlflowException as error:
        raise TrackingError(f"{model} version {version} is not in the registry; see MLflow's Models page") from error
    if "portllm.ported" not in version_tags:
        raise TrackingError(f"{model} version {version} has no tag portllm.ported; portllm did not register it")
    experiment = store.experiment_id(client, root)
    first = Artifact("ported", f"{model}/{version}", version_tags["portllm.ported"])
    return list(_walk([first], lambda artifact: _origin(client, experiment, artifact), lambda step: step.reads))


def descendants(fingerprint: str, *, root: Path) -> list[Step]:
    """Return all that was made from a base, patch or dataset, each with the run that wrote it, breadth-first."""
    client = store.connect(root)
    experiment = store.experiment_id(client, root)

    def made_from(artifact: Artifact) -> Iterator[Artifact]:
        for run in _runs(client, experiment, "read", artifact.fingerprint):
            yield from _artifacts(run, "write")

    children = made_from(Artifact("checkpoint", "", fingerprint))
    steps = _walk(
        list(children),
        lambda artifact: _origin(client, experiment, artifact),
        lambda step: list(made_from(step.artifact)),
    )
    return [step for step in steps if step.artifact.fingerprint != fingerprint]


def _walk(
    start: Sequence[Artifact], visit: Callable[[Artifact], Step], onward: Callable[[Step], Sequence[Artifact]]
) -> Iterator[Step]:
    queue, seen = list(start), set[str]()
    while queue:
        artifact = queue.pop(0)
        if artifact.fingerprint in seen:
            continue
        seen.add(artifact.fingerprint)
        step = visit(artifact)
        yield step
        queue += onward(step)


def _origin(client: MlflowClient, experiment: str, artifact: Artifact) -> Step:
    runs = _runs(client, experiment, "write", artifact.fingerprint)
    if not runs:
        return Step(artifact)
    run = runs[0]
    written = {one.fingerprint: one for one in _artifacts(run, "write")}
    return Step(
        artifact=written.get(artifact.fingerprint, artifact),
        run=run.info.run_id,
        name=run.info.run_name,
        stage=run.data.tags.get("portllm.stage", ""),
        commit=run.data.tags.get("mlflow.source.git.commit"),
        reads=tuple(_artifacts(run, "read")),
        datasets=tuple(_datasets(run)),
    )


def _runs(client: MlflowClient, experiment: str, direction: str, fingerprint: str) -> list[Run]:
    """Return the finished runs that read or wrote `fingerprint`, the latest first."""
    tag = f"portllm.{direction}.{fingerprint[:_PREFIX]}"
    query = f"attributes.status = 'FINISHED' and tags.`{tag}` IS NOT NULL"
    return list(client.search_runs([experiment], query, order_by=["attributes.start_time DESC"], max_results=1000))


def _artifacts(run: Run, direction: str) -> Iterator[Artifact]:
    number = 1
    while text := run.data.tags.get(_list_tag(direction, number)):
        yield from (Artifact(**one) for one in json.loads(text))
        number += 1


def _list_tag(direction: str, number: int) -> str:
    return f"portllm.{direction}s" if number == 1 else f"portllm.{direction}s.{number}"


def _datasets(run: Run) -> Iterator[Dataset]:
    for one in run.inputs.dataset_inputs:
        value = {tag.key: tag.value for tag in one.tags}.get("mlflow.data.context")
        context: Literal["training", "evaluation"] = "evaluation" if value == "evaluation" else "training"
        source = json.loads(one.dataset.source).get("uri", "")
        yield Dataset(one.dataset.name, one.dataset.digest, source, context)
