"""What ran, written down in MLflow; the only package that knows it.

A stage must neither pay for MLflow's import nor suffer from a tracker that is down. So the recording is
done by a child process (`python -m portllm.tracking`) that is fed JSON lines while the stage works:

    tracker.py    the stage's side: starts the child, feeds it, waits for it within bounds; never imports mlflow
    messages.py   what the two sides say to one another, cleaned of secrets and machine paths
    __main__.py   the child: reads the lines, keeps the run
    store.py      the child's MLflow client: the store, the experiment, the invocation's parent run
    registry.py   the model registry: one loadable version per accepted ported model
    generator.py  what a registered version runs when it is loaded (models-from-code: no pickle)
    ancestry.py   from a registered version back to the data and the commit; from a base to all made from it

A run names the fingerprints it read and wrote as tags, which is all that lineage needs.
"""

from __future__ import annotations

from portllm.tracking.ancestry import Step, descendants, lineage
from portllm.tracking.messages import Artifact, Candidate, Dataset, Registered
from portllm.tracking.tracker import Tracker, track

__all__ = ["Artifact", "Candidate", "Dataset", "Registered", "Step", "Tracker", "descendants", "lineage", "track"]
