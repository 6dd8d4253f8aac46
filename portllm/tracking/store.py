"""Connect the recorder to MLflow: the store, the experiment, and the run that groups one pipeline invocation."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

EXPERIMENT = "portllm"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
ALREADY_EXISTS = "RESOURCE_ALREADY_EXISTS"  # MLflow's code for a name that is taken
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "One run per stage execution, under one run per pipeline invocation.",
}


@dataclass(frozen=True)
class Invocation:
    """One execution of the pipeline; all its stages share `key`."""

    key: str
    name: str


def tracking_uri(root: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or the address of the SQLite store in the project at `root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / DATABASE}"


def registry_uri(root: Path) -> str:
    """Return MLFLOW_REGISTRY_URI, or the address of the store that holds the runs."""
    return os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri(root)


def connect(root: Path) -> MlflowClient:
    """Return a client of the project's store; the default store is created where it does not exist."""
    from mlflow import MlflowClient

    uri = tracking_uri(root)
    # two processes that create the tables of one database at once fail
    with locked(uri) if uri.startswith("sqlite:") else contextlib.nullcontext():
        client = MlflowClient(tracking_uri=uri, registry_uri=registry_uri(root))
        client.search_experiments(max_results=1)
    return client


def experiment_id(client: MlflowClient, root: Path) -> str:
    """Return the id of the experiment named by MLFLOW_EXPERIMENT_NAME, else `portllm`; create it where it is absent.

    Raises TrackingError for an experiment that was deleted.
    """
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    location = None if os.environ.get("MLFLOW_TRACKING_URI") else str(root.resolve() / ARTIFACTS)
    with locked(f"{tracking_uri(root)} {name}"):
        experiment = client.get_experiment_by_name(name) or _create_experiment(client, name, location)
    if experiment.lifecycle_stage != "active":
        raise TrackingError(f"the MLflow experiment {name} is deleted; restore it or set MLFLOW_EXPERIMENT_NAME")
    return str(experiment.experiment_id)


def _create_experiment(client: MlflowClient, name: str, location: str | None) -> Experiment:
    from mlflow.exceptions import MlflowException

    try:
        client.create_experiment(name, location, tags=_EXPERIMENT_TAGS)
    except MlflowException as error:
        # the lock does not reach another machine, which may have created it in between
        if error.error_code != ALREADY_EXISTS:
            raise
    return client.get_experiment_by_name(name)


def invocation() -> Invocation | None:
    """Return the pipeline invocation of this process: PORTLLM_INVOCATION, else the nearest `dvc` among its parents."""
    if name := os.environ.get("PORTLLM_INVOCATION"):
        return Invocation(name, name)
    import psutil

    experiment = os.environ.get("DVC_EXP_NAME", "")
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if (command := _dvc_command(process.cmdline())) is not None:
                seconds = process.create_time()
                identity = f"{process.pid} {seconds} {experiment}"
                key = hashlib.sha256(identity.encode()).hexdigest()[:16]
                # short: MLflow's table shows some eighteen characters, and the year in a column of its own
                start = time.strftime("%m-%d %H:%M", time.localtime(seconds))
                return Invocation(key, experiment or f"{command} {start}")
    return None


def parent_run(client: MlflowClient, experiment: str, group: Invocation) -> str:
    """Return the id of the run that groups the stages of `group`; create that run where it is absent."""
    with locked(f"invocation {group.key}"):
        runs = client.search_runs([experiment], f"tags.`portllm.invocation` = '{group.key}'", max_results=1)
        if runs:
            return str(runs[0].info.run_id)
        tags = {
            "portllm.invocation": group.key,
            "portllm.stage": "pipeline",
            "mlflow.source.name": "dvc",
            "mlflow.source.type": "LOCAL",
        }
        return str(client.create_run(experiment, run_name=group.name, tags=tags).info.run_id)


def close_parent(client: MlflowClient, run_id: str, status: str) -> None:
    """Set the end of the grouping run after each of its stages; a failed one stays failed."""
    has_failed = client.get_run(run_id).info.status == "FAILED" or status != "FINISHED"
    client.set_terminated(run_id, "FAILED" if has_failed else "FINISHED")


def git_tags(folder: Path) -> dict[str, str]:
    """Return the commit of the stage's folder, and whether tracked files differ from it; nothing outside git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"mlflow.source.git.commit": commit, "portllm.git.dirty": "true" if changes else "false"}


def _dvc_command(command: list[str]) -> str | None:
    # `dvc repro`, `python …/dvc repro`, `python -m dvc repro`
    names = [os.path.basename(part) for part in command[:3]]
    if "dvc" not in names:
        return None
    words = [word for word in command[names.index("dvc") + 1 :] if not word.startswith("-")]
    return " ".join(words[:2] if words[:1] == ["exp"] else words[:1])


def _git(folder: Path, *arguments: str) -> str:
    # no optional locks: DVC may use the same repository at the same time
    command = ["git", "--no-optional-locks", *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    return ""


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Admit one process of this user at a time to a block of this name (an advisory lock, freed with the process)."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"portllm-{os.getuid()}-{digest}.lock"
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
