"""The stage's side of tracking: sends messages to a recorder process, which can neither fail nor delay the stage."""

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
from portllm.tracking.messages import Artifact, Dataset, Registered, VersionRequest, one_line, plain

Status = Literal["FINISHED", "FAILED", "KILLED"]

# after an error or Ctrl-C the user waits for the prompt
_WAIT_AFTER_ERROR_SECONDS = 10.0
# registering copies complete checkpoints
_WAIT_FOR_REGISTRY_SECONDS = 3600.0

_CHILD_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "OMP_NUM_THREADS": "1",
}


class Tracker:
    """The messages that a stage may send about itself; without a recorder every call does nothing."""

    def __init__(self, recorder: Recorder | None, root: Path) -> None:
        self._recorder = recorder
        self._root = root
        self._decisions: Path | None = None
        self.is_registering = False
        self.registered: tuple[Registered, ...] = ()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send one point of each curve in `values`; MLflow shows it while the stage runs."""
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
        """Send the stage's result, once it is on disk: final metrics, lineage, and files or directories to store."""
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

    def register(self, requests: Sequence[VersionRequest], *, decisions: Path | None = None) -> None:
        """Create a version per request; `registered` holds the versions once the run has ended.

        `decisions` is the file that the stage has written its decisions to, for the error's text. The user requests
        the versions, so that here a failure is an error, unlike in all other calls. Raises TrackingError at once when
        nothing is being recorded, else when the run ends.
        """
        if self._recorder is None:
            raise TrackingError("registering needs MLflow, and tracking is off or could not start; call with --track")
        self.is_registering, self._decisions = True, decisions
        trees = [{**plain(one, self._root), "checkpoint": self._reachable(one.checkpoint)} for one in requests]
        self._send("register", requests=trees)

    def ended(self, status: Status, reply: Mapping[str, Any], warn: Callable[[str], object]) -> None:
        """Process the recorder's reply. Raises TrackingError where a stage without an error was not registered."""
        self.registered = tuple(Registered(**one) for one in reply.get("registered", ()))
        error = reply.get("error")
        if error and self.is_registering and status == "FINISHED":
            raise TrackingError(f"not registered in MLflow: {error}; {self._next_step()}")
        if error:
            results = "; the command itself succeeded" if status == "FINISHED" else ""
            warn(f"Warning: the run was not recorded in MLflow ({error}){results}")

    def _next_step(self) -> str:
        done = [f"{one.name} version {one.version} is registered" for one in self.registered]
        if self._decisions is not None:
            done.append(f"the decisions are in {self._decisions}")
        return "; ".join([*done, "run register again"])

    def _reachable(self, path: Path) -> str:
        # MLflow stores this path: relative to the recorder's directory where that is possible
        absolute = path.resolve()
        return str(absolute.relative_to(self._root) if absolute.is_relative_to(self._root) else absolute)

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
    """Record one stage execution as one MLflow run; an exception inside marks the run FAILED (Ctrl-C: KILLED).

    `root` is the project's root: names and params become relative to it, and mlflow.db is in it
    unless MLFLOW_TRACKING_URI names another store. `warn` receives one line when recording fails.
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
            reply = recorder.close(status, wait_seconds=_wait_limit(status, wait_seconds, tracker.is_registering))
            tracker.ended(status, reply, warn)


class Recorder:
    """The child process and the thread that writes to it: a full pipe or an ended child never blocks the stage."""

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
        """End the run with `status`, wait for the child, return its reply; `error` in it: the run was not recorded."""
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
    fields = {"stage": stage, "name": plain(name, root), "params": plain(params, root), "folder": str(Path.cwd())}
    recorder.send("start", **fields, time_ms=int(time.time() * 1000))
    return recorder


def _wait_limit(status: Status, wait_seconds: float, is_registering: bool) -> float:
    if status != "FINISHED":
        return min(wait_seconds, _WAIT_AFTER_ERROR_SECONDS)
    return max(wait_seconds, _WAIT_FOR_REGISTRY_SECONDS) if is_registering else wait_seconds


def _child_environment() -> dict[str, str]:
    # the child must import this package, and no file of a library's name in the project's root
    package_parent = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    return {**_CHILD_DEFAULTS, **os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {str(key): float(value) for key, value in values.items()}


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
