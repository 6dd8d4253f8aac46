"""MLflow's records of what ran; the only package that uses MLflow.

A stage must neither wait for MLflow's import nor fail with an unreachable server. A child process
(`python -m portllm.tracking`) therefore does the recording; the stage sends it JSON lines while it works:

    tracker.py    the stage's side: starts the child, sends messages, waits within bounds; never imports mlflow
    messages.py   the messages between the two sides, cleaned of secrets and of the machine's paths
    __main__.py   the child: reads the messages and writes the run
    store.py      the child's MLflow client: the store, the experiment, the invocation's parent run, locks
    registry.py   the model registry: one loadable version per accepted ported model
    generator.py  the code of a registered version, run when it is loaded (models-from-code: no pickle)
    ancestry.py   from a registered version back to the data and the commit; from a base to all that was made from it

A run has the fingerprints that it read and wrote as tags; lineage needs nothing else.
"""

from __future__ import annotations

from portllm.tracking.ancestry import Step, descendants, lineage
from portllm.tracking.messages import Artifact, Dataset, Registered, VersionRequest
from portllm.tracking.tracker import Tracker, track

__all__ = ["Artifact", "Dataset", "Registered", "Step", "Tracker", "VersionRequest", "descendants", "lineage", "track"]
