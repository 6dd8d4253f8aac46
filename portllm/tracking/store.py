"""The recorder's way into MLflow: which store, which experiment, and the run that groups one pipeline invocation."""

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

EXPERIMENT = "portllm"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "One run per stage execution, under one run per pipeline invocation.",
}


@dataclass(frozen=True)
class Invocation:
    """One execution of the pipeline: `key` is the same for all its stages."""

    key: str
    name: str


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the SQLite store of the project at `root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / DATABASE}"


def connect(root: Path) -> MlflowClient:
    """A client of the project's store, which is created when it is the default one and absent."""
    from mlflow import MlflowClient

    uri = tracking_uri(root)
    # two processes that create the tables of one database at once fail
    with _locked(uri) if uri.startswith("sqlite:") else contextlib.nullcontext():
        client = MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        client.search_experiments(max_results=1)
    return client


def experiment_id(client: MlflowClient, root: Path) -> str:
    """The id of the experiment named by MLFLOW_EXPERIMENT_NAME, else `portllm`; made when absent."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    location = None if os.environ.get("MLFLOW_TRACKING_URI") else str(root.resolve() / ARTIFACTS)
    with _locked(f"{tracking_uri(root)} {name}"):
        found = client.get_experiment_by_name(name)
        if found is None:
            return str(client.create_experiment(name, location, tags=_EXPERIMENT_TAGS))
    if found.lifecycle_stage != "active":
        raise TrackingError(f"the MLflow experiment {name} is deleted; restore it or set MLFLOW_EXPERIMENT_NAME")
    return str(found.experiment_id)


def invocation() -> Invocation | None:
    """The pipeline invocation this process belongs to: PORTLLM_INVOCATION, else the nearest `dvc` above it."""
    if named := os.environ.get("PORTLLM_INVOCATION"):
        return Invocation(named, named)
    import psutil

    experiment = os.environ.get("DVC_EXP_NAME", "")
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if (command := _dvc_command(process.cmdline())) is not None:
                started = process.create_time()
                identity = f"{process.pid} {started} {experiment}"
                key = hashlib.sha256(identity.encode()).hexdigest()[:16]
                # short: MLflow's table shows some eighteen characters, and the year in a column of its own
                when = time.strftime("%m-%d %H:%M", time.localtime(started))
                return Invocation(key, experiment or f"{command} {when}")
    return None


def parent_run(client: MlflowClient, experiment: str, group: Invocation) -> str:
    """The id of the run that groups `group`, found by its tag or made."""
    with _locked(f"invocation {group.key}"):
        found = client.search_runs([experiment], f"tags.`portllm.invocation` = '{group.key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {
            "portllm.invocation": group.key,
            "portllm.stage": "pipeline",
            "mlflow.source.name": "dvc",
            "mlflow.source.type": "LOCAL",
        }
        return str(client.create_run(experiment, run_name=group.name, tags=tags).info.run_id)


def close_parent(client: MlflowClient, run_id: str, status: str) -> None:
    """Give the grouping run an end after each of its stages; once failed it stays failed."""
    known = client.get_run(run_id).info.status
    client.set_terminated(run_id, "FAILED" if known == "FAILED" or status != "FINISHED" else "FINISHED")


def git_tags(folder: Path) -> dict[str, str]:
    """The commit the stage ran at, and whether tracked files had been changed since; empty outside git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"mlflow.source.git.commit": commit, "portllm.git.dirty": "true" if changed else "false"}


def _dvc_command(command: list[str]) -> str | None:
    # `dvc repro`, `python …/dvc repro`, `python -m dvc repro`
    names = [os.path.basename(part) for part in command[:3]]
    if "dvc" not in names:
        return None
    words = [word for word in command[names.index("dvc") + 1 :] if not word.startswith("-")]
    return " ".join(words[:2] if words[:1] == ["exp"] else words[:1])


def _git(folder: Path, *arguments: str) -> str:
    # no optional locks: DVC may be at work in the same repository
    command = ["git", "--no-optional-locks", *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    return ""


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """One process of this user at a time inside a block of this name (an advisory lock that dies with the process)."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"portllm-{os.getuid()}-{digest}.lock"
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
