"""The model registry: one loadable version per ported checkpoint that passed its gate.

A version is known by its fingerprint: registering the same tensors again makes no second version.
MLflow copies the checkpoint among its artifacts, so a version outlives the next `dvc repro`.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import TrackingError
from portllm.tracking.messages import Registered, in_alphabet

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

GENERATOR = Path(__file__).with_name("generator.py")
_LOADED_WITH = ("accelerate", "torch", "transformers")
# what a version that is an adapter is loaded with beyond that; MLflow lets a loader set no key that is not there
_ADAPTER_WITH, _ADAPTER_ASKS = ("peft",), {"base": ""}
_DESCRIPTION = (
    "A patch trained on an earlier release of its base model and ported, without training, onto later ones. "
    "Each version is one release; it loads with mlflow.pyfunc and continues prompts."
)


def register(client: MlflowClient, run_id: str, candidates: Sequence[Mapping[str, Any]]) -> list[Registered]:
    """A version for each candidate (see messages.Candidate, as JSON), linked to the run. Raises TrackingError."""
    return [_register(client, run_id, one) for one in candidates]


def _register(client: MlflowClient, run_id: str, candidate: Mapping[str, Any]) -> Registered:
    name = candidate["name"]
    if not re.fullmatch(r"[\w. -]+", name):
        raise TrackingError(f"{name!r} cannot name a registered model; use letters, digits, '.', '_' and '-'")
    known = client.search_model_versions(f"name = '{name}' and tags.`portllm.ported` = '{candidate['ported']}'")
    version = known[0] if known else _create(client, run_id, candidate)
    if not known and candidate["alias"] and _is_newest(client, candidate):
        client.set_registered_model_alias(name, candidate["alias"], version.version)
    aliases = client.get_model_version(name, version.version).aliases
    return Registered(name=name, version=str(version.version), created=not known, aliases=sorted(aliases))


def _create(client: MlflowClient, run_id: str, candidate: Mapping[str, Any]) -> ModelVersion:
    name, model_id = candidate["name"], _log_model(client, run_id, candidate)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, tags={"task": candidate["task"]}, description=_DESCRIPTION)
    marks = {f"portllm.{key}": candidate[key] for key in ("ported", "patch", "base") if candidate[key]}
    tags = {"release": candidate["release"], "task": candidate["task"], **marks}
    tags |= {in_alphabet(key): f"{value:.4f}" for key, value in candidate["metrics"].items()}
    source = f"models:/{model_id}"
    return client.create_model_version(
        name, source, run_id, tags=tags, description=candidate["description"], model_id=model_id
    )


def _log_model(client: MlflowClient, run_id: str, candidate: Mapping[str, Any]) -> str:
    import mlflow

    adapter = (Path(candidate["checkpoint"]) / "adapter_config.json").is_file()
    mlflow.set_tracking_uri(client.tracking_uri)
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name=f"{candidate['name']}-{candidate['release']}".replace(".", "_"),
            python_model=str(GENERATOR),
            artifacts={"checkpoint": candidate["checkpoint"]},
            model_config={"max_new_tokens": 32, **(_ADAPTER_ASKS if adapter else {})},
            # named here: MLflow would otherwise load the model in another process to see what it imports
            pip_requirements=[
                f"{package}=={_release(package)}" for package in (*_LOADED_WITH, *(_ADAPTER_WITH if adapter else ()))
            ],
            metadata={"fingerprint": candidate["ported"]},
        )
    for key, value in candidate["metrics"].items():
        client.log_metric(run_id, f"{candidate['task']}/{in_alphabet(key)}", value, model_id=info.model_id)
    return str(info.model_id)


def _is_newest(client: MlflowClient, candidate: Mapping[str, Any]) -> bool:
    """Whether no later release holds the alias: stages of two releases may run in either order."""
    holder = client.get_registered_model(candidate["name"]).aliases.get(candidate["alias"])
    if holder is None:
        return True
    held = client.get_model_version(candidate["name"], str(holder)).tags.get("release", "")
    return _natural(candidate["release"]) >= _natural(held)


def _natural(release: str) -> list[tuple[int, int | str]]:
    # v10 comes after v9
    parts = re.findall(r"\d+|\D+", release)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _release(package: str) -> str:
    # without the local part (+cpu), which no index but one knows
    return importlib.metadata.version(package).partition("+")[0]
