"""The model registry: one loadable version per ported checkpoint that passed its gate.

A fingerprint identifies a version: registering the same tensors again creates no second version, not even when two
processes register at the same time. On one machine a lock keeps them apart. On two machines with one server both may
create a version; then the lower number stays, and the process that created the higher one deletes its own.
MLflow copies the checkpoint into its artifacts, so a version outlives the next `dvc repro`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.files import links
from portllm.checkpoint.files.names import ADAPTER_CONFIG
from portllm.errors import TrackingError
from portllm.tracking import store
from portllm.tracking.messages import Registered, in_alphabet

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

GENERATOR = Path(__file__).with_name("generator.py")
_REQUIREMENTS = ("accelerate", "torch", "transformers")
# a version that is an adapter needs one package and one key more; MLflow lets a loader set only keys that exist
_ADAPTER_REQUIREMENTS, _ADAPTER_CONFIG = ("peft",), {"base": ""}
_DESCRIPTION = (
    "A patch trained on an earlier release of its base model and ported, without training, onto later ones. "
    "Each version is one release; it loads with mlflow.pyfunc and continues prompts."
)


def register(
    client: MlflowClient, run_id: str, requests: Sequence[Mapping[str, Any]], *, registry_uri: str
) -> Iterator[Registered]:
    """Yield one version per request (messages.VersionRequest as JSON), linked to the run.

    `registry_uri` is the client's, and identifies the lock. Raises TrackingError.
    """
    for request in requests:
        # MLflow's filters quote with ', so that no other name may reach them
        if not re.fullmatch(r"[\w. -]+", request["name"]):
            raise TrackingError(
                f"{request['name']!r} cannot name a registered model; use letters, digits, '.', '_' and '-'"
            )
        with store.locked(f"registry {registry_uri} {request['name']}"):
            yield _register(client, run_id, request)


def _register(client: MlflowClient, run_id: str, request: Mapping[str, Any]) -> Registered:
    name = request["name"]
    version = _first_version(client, request)
    is_created = False
    if version is None:
        created = _create(client, run_id, request)
        version = _first_version(client, request) or created
        is_created = str(version.version) == str(created.version)  # MLflow gives a number or its text
        if not is_created:
            _withdraw(client, created)
    note = _set_alias(client, request, str(version.version)) if request["alias"] else ""
    aliases = sorted(client.get_model_version(name, version.version).aliases)
    return Registered(name=name, version=str(version.version), created=is_created, aliases=aliases, note=note)


def _first_version(client: MlflowClient, request: Mapping[str, Any]) -> ModelVersion | None:
    """Return the lowest version with the request's fingerprint, None when the registry has none.

    A server numbers versions in the order in which it stores them, so all processes agree on the lowest one.
    """
    query = f"name = '{request['name']}' and tags.`portllm.ported` = '{request['ported']}'"
    return min(client.search_model_versions(query), key=lambda version: int(version.version), default=None)


def _withdraw(client: MlflowClient, version: ModelVersion) -> None:
    """Delete a version that this process created after another process had created one of the same tensors."""
    client.delete_model_version(version.name, version.version)
    client.delete_logged_model(version.source.removeprefix("models:/"))


def _create(client: MlflowClient, run_id: str, request: Mapping[str, Any]) -> ModelVersion:
    name, model_id = request["name"], _log_model(client, run_id, request)
    _create_model(client, request)
    fingerprints = {f"portllm.{key}": request[key] for key in ("ported", "patch", "base") if request[key]}
    tags = {"release": request["release"], "task": request["task"], **fingerprints}
    tags |= {in_alphabet(key): f"{value:.4f}" for key, value in request["metrics"].items()}
    source = f"models:/{model_id}"
    return client.create_model_version(
        name, source, run_id, tags=tags, description=request["description"], model_id=model_id
    )


def _create_model(client: MlflowClient, request: Mapping[str, Any]) -> None:
    """Create the registered model unless it exists, or another process creates it at the same time."""
    from mlflow.exceptions import MlflowException

    name = request["name"]
    if client.search_registered_models(f"name = '{name}'"):
        return
    try:
        client.create_registered_model(name, tags={"task": request["task"]}, description=_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != store.ALREADY_EXISTS:
            raise


def _log_model(client: MlflowClient, run_id: str, request: Mapping[str, Any]) -> str:
    import mlflow

    checkpoint = Path(request["checkpoint"])
    is_adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    packages = (*_REQUIREMENTS, *(_ADAPTER_REQUIREMENTS if is_adapter else ()))
    mlflow.set_tracking_uri(client.tracking_uri)
    with mlflow.start_run(run_id=run_id), _without_links(checkpoint) as folder:
        info = mlflow.pyfunc.log_model(
            name=f"{request['name']}-{request['release']}".replace(".", "_"),
            python_model=str(GENERATOR),
            artifacts={"checkpoint": str(folder)},
            model_config={"max_new_tokens": 32, **(_ADAPTER_CONFIG if is_adapter else {})},
            # named here: MLflow would otherwise load the model in another process to see what it imports
            pip_requirements=[f"{package}=={_public_version(package)}" for package in packages],
            metadata={"fingerprint": request["ported"]},
        )
    for key, value in request["metrics"].items():
        client.log_metric(run_id, f"{request['task']}/{in_alphabet(key)}", value, model_id=info.model_id)
    return str(info.model_id)


@contextlib.contextmanager
def _without_links(checkpoint: Path) -> Iterator[Path]:
    """Yield `checkpoint`, or a directory of its name without links: MLflow refuses links, those of DVC included."""
    if not links.has_links(checkpoint):
        yield checkpoint
        return
    root = links.dvc_root(checkpoint)
    # DVC's own folder for temporary files: outside git, and mostly on the file system of the cache
    place = root / links.DVC / "tmp" if root is not None else None
    with tempfile.TemporaryDirectory(prefix="portllm-", dir=place if place and place.is_dir() else None) as parent:
        folder = Path(parent) / checkpoint.name
        links.materialise(checkpoint, folder)
        yield folder


def _set_alias(client: MlflowClient, request: Mapping[str, Any], version: str) -> str:
    """Set the request's alias on `version`, and return "".

    A version of a later release keeps the alias, since the stages of two releases may run in either order. The
    returned note then names that version.
    """
    name, alias = request["name"], request["alias"]
    holder = client.get_registered_model(name).aliases.get(alias)
    if holder is not None and str(holder) != version:
        release = client.get_model_version(name, str(holder)).tags.get("release", "")
        if _natural(request["release"]) < _natural(release):
            return f"the alias {alias} stays on version {holder}, which is of the later release {release}"
    client.set_registered_model_alias(name, alias, version)
    return ""


def _natural(release: str) -> list[tuple[int, int | str]]:
    # v10 comes after v9
    parts = re.findall(r"\d+|\D+", release)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _public_version(package: str) -> str:
    # without the local part (+cpu), which no package index but one has
    return importlib.metadata.version(package).partition("+")[0]
