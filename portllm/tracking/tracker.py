"""The stage's side of tracking: feeds a recorder process, and never fails or waits long because of it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from portllm.errors import TrackingError
from portllm.tracking.messages import Artifact, Candidate, Dataset, Registered, one_line, plain

Status = Literal["FINISHED", "FAILED", "KILLED"]

# after an error or Ctrl-C the user waits for the prompt, not for the tracker
_WAIT_AFTER_ERROR_SECONDS = 10.0
# registering copies whole checkpoints
_WAIT_FOR_REGISTRY_SECONDS = 3600.0

_CHILD_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "OMP_NUM_THREADS": "1",
}


class Tracker:
    """What a stage may tell about itself; without a recorder every call does nothing."""

    def __init__(self, recorder: Recorder | None, root: Path) -> None:
        self._recorder = recorder
        self._root = root
        self.registering = False
        self.registered: tuple[Registered, ...] = ()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve in `values`, seen in MLflow while the stage still runs."""
        self._send("metrics", step=step, values=_floats(values), time_ms=int(time.time() * 1000))

    def finish(
        self,
        *,
        metrics: Mapping[str, float] | None = None,
        reads: Sequence[Artifact] = (),
        writes: Sequence[Artifact] = (),
        datasets: Sequence[Dataset] = (),
        artifacts: Sequence[Path] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """The stage's result, once it is on disk: final metrics, lineage, and files or directories to keep."""
        self._send(
            "result",
            metrics=_floats(metrics or {}),
            reads=plain(list(reads), self._root),
            writes=plain(list(writes), self._root),
            datasets=plain(list(datasets), self._root),
            artifacts=[str(path.resolve()) for path in artifacts],
            tags=plain(tags or {}, self._root),
            time_ms=int(time.time() * 1000),
        )

    def register(self, candidates: Sequence[Candidate]) -> None:
        """Make each candidate a version of its registered model; `registered` names them once the run has ended.

        Unlike all else here this is asked for by the user, so a registry that refuses is an error.
        Raises TrackingError at once when nothing is being recorded, else when the run ends.
        """
        if self._recorder is None:
            raise TrackingError("registering needs MLflow, and tracking is off or could not start; call with --track")
        self.registering = True
        told = [{**plain(one, self._root), "checkpoint": self._reachable(one.checkpoint)} for one in candidates]
        self._send("register", candidates=told)

    def ended(self, status: Status, reply: Mapping[str, Any], warn: Callable[[str], object]) -> None:
        """Take the recorder's last word. Raises TrackingError where a stage that went well was not registered."""
        error = reply.get("error")
        if error and self.registering and status == "FINISHED":
            raise TrackingError(f"not registered in MLflow: {error}; the decisions are on disk, run register again")
        if error:
            warn(f"Warning: the run was not recorded in MLflow ({error}); results are on disk")
        self.registered = tuple(Registered(**one) for one in reply.get("registered", ()))

    def _reachable(self, path: Path) -> str:
        # MLflow writes this path down: relative to the recorder's directory where that is possible
        whole = path.resolve()
        return str(whole.relative_to(self._root) if whole.is_relative_to(self._root) else whole)

    def _send(self, op: str, **fields: Any) -> None:
        if self._recorder is not None:
            self._recorder.send(op, **fields)


@contextlib.contextmanager
def track(
    stage: str,
    *,
    name: str,
    params: Mapping[str, Any],
    root: Path,
    enabled: bool = True,
    warn: Callable[[str], object] | None = None,
    wait_seconds: float = 60.0,
) -> Iterator[Tracker]:
    """One MLflow run around one stage execution; an exception inside marks the run FAILED (Ctrl-C: KILLED).

    `root` is the project's root: names and params are made relative to it, and mlflow.db stands in it
    unless MLFLOW_TRACKING_URI says otherwise. When recording fails, `warn` is told once, in one line.
    """
    root, warn = root.resolve(), warn or _to_stderr
    recorder = _start(stage, name=name, params=params, root=root, warn=warn) if enabled else None
    tracker = Tracker(recorder, root)
    status: Status = "KILLED"
    try:
        yield tracker
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        if recorder is not None:
            reply = recorder.close(status, wait_seconds=_patience(status, wait_seconds, tracker.registering))
            tracker.ended(status, reply, warn)


class Recorder:
    """The child process and the thread that feeds it: a full pipe or a dead child never blocks the stage."""

    def __init__(self, cwd: Path) -> None:
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "portllm.tracking", str(os.getpid())],
                cwd=cwd,
                env=_child_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                # its own session: Ctrl-C and a kill of the group reach the stage; the child then sees the pipe's end
                start_new_session=True,
            )
        except OSError:
            self._errors.close()
            raise
        self._feeder = threading.Thread(target=self._feed, name="portllm-tracking", daemon=True)
        self._feeder.start()

    def send(self, op: str, **fields: Any) -> None:
        """Queue one message; returns at once."""
        self._queue.put(json.dumps({"op": op, **fields}).encode() + b"\n")

    def close(self, status: Status, *, wait_seconds: float) -> dict[str, Any]:
        """End the run with `status` and wait for the child; its reply, with `error` when the run was not recorded."""
        self.send("close", status=status, time_ms=int(time.time() * 1000))
        self._queue.put(None)
        try:
            self._process.wait(timeout=wait_seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {wait_seconds:.0f} s"}
        finally:
            reply = self._reap()
        return reply

    def _reap(self) -> dict[str, Any]:
        self._process.kill()  # does nothing to a child that has ended
        self._process.wait()
        self._feeder.join(timeout=1.0)
        with self._errors, contextlib.closing(self._process.stdout) as stdout:  # type: ignore[type-var]
            try:
                reply: dict[str, Any] = json.loads(stdout.read())  # type: ignore[union-attr]
            except ValueError:
                self._errors.seek(0)
                lines = self._errors.read().decode(errors="replace").strip().splitlines() or [""]
                reply = {"error": one_line(f"the recorder ended with {self._process.returncode}: {lines[-1]}")}
        return reply

    def _feed(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - Popen was given PIPE
        with contextlib.suppress(OSError), stdin:
            for line in iter(self._queue.get, None):
                view = memoryview(line)
                while view:
                    view = view[os.write(stdin.fileno(), view) :]


def _start(
    stage: str, *, name: str, params: Mapping[str, Any], root: Path, warn: Callable[[str], object]
) -> Recorder | None:
    try:
        recorder = Recorder(root)
    except OSError as error:
        warn(f"Warning: the run will not be recorded in MLflow ({one_line(error)})")
        return None
    told = {"stage": stage, "name": plain(name, root), "params": plain(params, root), "folder": str(Path.cwd())}
    recorder.send("start", **told, time_ms=int(time.time() * 1000))
    return recorder


def _patience(status: Status, wait_seconds: float, registering: bool) -> float:
    if status != "FINISHED":
        return min(wait_seconds, _WAIT_AFTER_ERROR_SECONDS)
    return max(wait_seconds, _WAIT_FOR_REGISTRY_SECONDS) if registering else wait_seconds


def _child_environment() -> dict[str, str]:
    # the child must find this very package, and not whatever bears a library's name in the project's root
    package_parent = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    return {**_CHILD_DEFAULTS, **os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {str(key): float(value) for key, value in values.items()}


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
