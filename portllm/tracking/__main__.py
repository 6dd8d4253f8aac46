"""The recorder: reads a stage's messages from stdin, writes its MLflow run, replies with one JSON object.

It ends when the stage closes the run, when the pipe ends, or when the stage has ended. A run without a close
message is marked KILLED, so that no run stays RUNNING.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from portllm.tracking import ancestry, registry, store
from portllm.tracking.messages import Message, Registered, flatten, in_alphabet, one_line, portions

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's limits for one request
_METRICS_PER_BATCH = 1000
_PARAMS_AND_TAGS_PER_BATCH = 100
# how often curves are sent while the stage runs
_FLUSH_SECONDS = 1.0


def main() -> NoReturn:
    """Record one run; stdout carries only the reply, all other output goes to stderr."""
    reply_to = os.dup(1)
    os.dup2(2, 1)
    try:
        reply = record(Lines(0, parent=int(sys.argv[1])))
    except Exception as error:
        reply = {"error": one_line(error)}
    os.write(reply_to, json.dumps(reply).encode())
    sys.stderr.flush()
    # all is written; the stage waits for this process, and MLflow's own exit takes long
    os._exit(1 if "error" in reply else 0)


class Lines:
    """The messages of a pipe, received in portions of any size, until the pipe or the parent ends."""

    def __init__(self, handle: int, *, parent: int) -> None:
        self._handle = handle
        self._parent = parent
        self._rest = b""
        self.is_over = False

    def read(self, seconds: float) -> list[Message]:
        """Return the messages that arrive within `seconds`; return after the first portion."""
        ready, _, _ = select.select([self._handle], [], [], seconds)
        if ready:
            portion = os.read(self._handle, 1 << 16)
            self.is_over = not portion
            *complete, self._rest = (self._rest + portion).split(b"\n")
            return [json.loads(line) for line in complete]
        # a worker that the stage forked may hold the pipe open after the stage was killed
        self.is_over = os.getppid() != self._parent
        return []


def record(lines: Lines) -> dict[str, Any]:
    """Write one run until it is closed; return its id and the registered versions, and an error if any."""
    pending: list[Message] = []
    while not pending and not lines.is_over:
        pending = lines.read(_FLUSH_SECONDS)
    if not pending:
        return {"error": "nothing to record"}
    run = Run(pending.pop(0))
    try:
        while True:
            for message in pending:
                if message["op"] == "close":
                    return run.close(message["status"], message["time_ms"])
                run.handle(message)
            run.flush()
            if lines.is_over:
                return run.close("KILLED", int(time.time() * 1000))
            pending = lines.read(_FLUSH_SECONDS)
    except Exception as error:
        run.abandon()
        return {"error": one_line(error), "registered": run.registered}


class Run:
    """One run in MLflow, from its first message to its end."""

    def __init__(self, start: Message) -> None:
        self._root = Path.cwd()
        self._curves: list[tuple[str, float, int, int]] = []
        self._registered: list[Registered] = []
        # before the import of MLflow, during which the stage may end, and with it the link to DVC
        group = store.invocation()
        # importing MLflow creates a million permanent objects: collecting garbage among them costs a sixth of its time
        gc.disable()
        self._client: MlflowClient = store.connect(self._root)
        gc.enable()
        experiment = store.experiment_id(self._client, self._root)
        self._parent = store.parent_run(self._client, experiment, group) if group else None
        self._id = self._create(experiment, start)
        self.flush(params=flatten(start["params"]))

    def _create(self, experiment: str, start: Message) -> str:
        tags = {
            "mlflow.source.name": f"portllm {start['stage']}",
            "mlflow.source.type": "LOCAL",
            "portllm.stage": start["stage"],
            # the stage's own folder: a DVC experiment runs in a copy of the project, at another commit
            **store.git_tags(Path(start["folder"])),
        }
        if self._parent:
            tags["mlflow.parentRunId"] = self._parent
        if stage := os.environ.get("DVC_STAGE"):
            tags["portllm.dvc.stage"] = stage
        run = self._client.create_run(experiment, start["time_ms"], tags, start["name"])
        return str(run.info.run_id)

    def handle(self, message: Message) -> None:
        """Process one message that is neither the first nor the last."""
        if message["op"] == "metrics":
            self._add_metrics(message["values"], message["time_ms"], message["step"])
        elif message["op"] == "result":
            self._add_result(message)
        elif message["op"] == "register":
            self.flush()
            uri = store.registry_uri(self._root)
            for version in registry.register(self._client, self._id, message["requests"], registry_uri=uri):
                self._registered.append(version)

    @property
    def registered(self) -> list[dict[str, Any]]:
        """The versions registered so far, as JSON."""
        return [dataclasses.asdict(version) for version in self._registered]

    def _add_metrics(self, values: dict[str, float], time_ms: int, step: int) -> None:
        self._curves += [(in_alphabet(key), value, time_ms, step) for key, value in values.items()]

    def _add_result(self, result: Message) -> None:
        self._add_metrics(result["metrics"], result["time_ms"], 0)
        tags = {key: str(value) for key, value in result["tags"].items()}
        self.flush(tags={**tags, **ancestry.tags("read", result["reads"]), **ancestry.tags("write", result["writes"])})
        self._add_datasets(result["datasets"])
        for path in map(Path, result["artifacts"]):
            if path.is_dir():
                self._client.log_artifacts(self._id, str(path), path.name)
            else:
                self._client.log_artifact(self._id, str(path))

    def _add_datasets(self, datasets: Sequence[dict[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if not datasets:
            return
        inputs = []
        for one in datasets:
            # MLflow stores 36 characters of a digest
            entity = Dataset(one["name"], one["digest"][:36], "local", json.dumps({"uri": one["source"]}))
            inputs.append(DatasetInput(entity, [InputTag("mlflow.data.context", one["context"])]))
        self._client.log_inputs(self._id, inputs)

    def flush(self, *, params: dict[str, str] | None = None, tags: dict[str, str] | None = None) -> None:
        """Send curves, parameters and tags, in portions of the size that MLflow accepts."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(*point) for point in self._curves]
        entities = [Param(*pair) for pair in (params or {}).items()]
        labels = [RunTag(*pair) for pair in (tags or {}).items()]
        for part in portions(metrics, _METRICS_PER_BATCH):
            self._client.log_batch(self._id, metrics=part)
        for part in portions(entities, _PARAMS_AND_TAGS_PER_BATCH):
            self._client.log_batch(self._id, params=part)
        for part in portions(labels, _PARAMS_AND_TAGS_PER_BATCH):
            self._client.log_batch(self._id, tags=part)
        self._curves.clear()

    def close(self, status: str, time_ms: int) -> dict[str, Any]:
        """End the run, and set the end of its invocation."""
        self.flush()
        # the recorder registers after the stage has sent its close message
        ended = int(time.time() * 1000) if self._registered else time_ms
        self._client.set_terminated(self._id, status, ended)
        if self._parent:
            store.close_parent(self._client, self._parent, status)
        return {"run_id": self._id, "registered": self.registered}

    def abandon(self) -> None:
        """End the run after an error, so that it does not stay RUNNING, where the store still answers."""
        try:
            self._client.set_terminated(self._id, "KILLED")
        except Exception as error:
            sys.stderr.write(f"{one_line(error)}\n")


if __name__ == "__main__":
    main()
