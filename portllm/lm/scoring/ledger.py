"""What was scored before, by content, in the user's cache directory: nothing is scored twice.

An entry stands under the digest of all that its figures depend on (see portllm.lm.scoring.identity), says all of that
again, and holds a digest of its own; it is believed only where the three agree and every value is of the kind it
should be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portllm.checkpoint.files.output import staged_file
from portllm.errors import OutputError
from portllm.lm.scoring.scored import Sample, Scored

FORMAT = 2


def find(key: Mapping[str, Any]) -> Scored | None:
    """What was scored under `key`; None where nothing was, or what is there is damaged or another's."""
    try:
        tree = json.loads(_file(key).read_text(encoding="utf-8"))
        told = tree["scored"]
        if tree["format"] != FORMAT or tree["key"] != json.loads(_plain(key)) or tree["digest"] != _digest(told):
            return None
        scored = _read(told)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return scored if scored.task == key["task"] else None


def keep(key: Mapping[str, Any], scored: Scored) -> None:
    """Remember what was scored under `key`; a cache that cannot be written costs time, not correctness."""
    told = json.loads(json.dumps({**vars(scored), "samples": [vars(sample) for sample in scored.samples]}))
    text = json.dumps({"format": FORMAT, "key": key, "scored": told, "digest": _digest(told)}, ensure_ascii=False)
    with contextlib.suppress(OutputError, OSError, ValueError), staged_file(_file(key)) as partial:
        partial.write_text(text, encoding="utf-8")


def _read(tree: Mapping[str, Any]) -> Scored:
    """Raises KeyError, TypeError and ValueError for what is not of the right kind."""
    samples = tuple(
        Sample(
            doc_id=_of(int, one["doc_id"]),
            score=_of(float, one["score"]),
            answer=_of(str, one["answer"]),
            target=_of(str, one["target"]),
            metrics={_of(str, k): _of(float, v) for k, v in one["metrics"].items()},
            answers={_of(str, k): _of(str, v) for k, v in one["answers"].items()},
            loglikelihoods=tuple(_of(float, value) for value in one["loglikelihoods"]),
            written=_of(str, one["written"]),
        )
        for one in tree["samples"]
    )
    metrics = {_of(str, k): _of(float, v) for k, v in tree["metrics"].items()}
    return Scored(task=_of(str, tree["task"]), split=_of(str, tree["split"]), metrics=metrics, samples=samples)


def _of(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r:.60}")
    return value


def _file(key: Mapping[str, Any]) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    name = hashlib.sha256(_plain(key).encode()).hexdigest()
    return Path(root) / "portllm" / "scores" / name[:2] / f"{name}.json"


def _digest(told: Any) -> str:
    return hashlib.sha256(_plain(told).encode()).hexdigest()


def _plain(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)
