"""What each verb read and wrote, for the tracker, taken from the verb's record."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.record.provenance import digests, public_name
from portllm.checkpoint.record.records import DatasetRecord, PatchRecord, PortRecord, ReleaseRecord, Source
from portllm.tracking import Artifact, Dataset, VersionRequest

if TYPE_CHECKING:
    from portllm.verbs.evaluate import Evaluation
    from portllm.verbs.register import Decision, RegisterRecord
    from portllm.verbs.report import ReportRecord
    from portllm.verbs.verify import VerifyRecord

Result = dict[str, Any]
# set by `dvc exp run` for the commands of its stages
DVC_EXPERIMENT = "DVC_EXP_NAME"


def of_dataset(record: DatasetRecord, out: Path) -> Result:
    """Return the result of prepare: a dataset."""
    return {
        "metrics": {f"rows_{split}": rows for split, rows in record.rows.items()},
        "writes": [_dataset(out, split, digest) for split, digest in record.digests.items()],
    }


def of_release(record: ReleaseRecord, out: Path) -> Result:
    """Return the result of fetch or evolve: a checkpoint, from data, the release before it, or another source."""
    return {
        "metrics": {**record.metrics, **{f"probe_{task}": share for task, share in record.probe.items()}},
        "reads": [
            *_sources("checkpoint", record.base),
            *_sources("checkpoint", record.source),
            *_files(record.data),
        ],
        "writes": [Artifact("checkpoint", public_name(out), record.fingerprint)],
        "datasets": _used(record.data, "training"),
        "artifacts": [out / ReleaseRecord.FILE],
    }


def of_patch(record: PatchRecord, out: Path) -> Result:
    """Return the result of train: a patch, from a base and a task's data."""
    return {
        "metrics": record.metrics,
        "reads": [*_sources("checkpoint", record.base), *_files(record.data)],
        "writes": [Artifact("patch", public_name(out), record.fingerprint)],
        "datasets": _used(record.data, "training"),
        "artifacts": [out / PatchRecord.FILE, out / "history.csv"],
        "tags": {"portllm.task": record.task},
    }


def of_port(record: PortRecord, out: Path) -> Result:
    """Return the result of port: a patch on another base."""
    counts = {f"modules_{k}": v for k, v in record.modules.items()} | {
        f"tensors_{k}": v for k, v in record.tensors.items()
    }
    return {
        "metrics": counts,
        "reads": [*_sources("checkpoint", record.base), *_sources("patch", record.patch)],
        "writes": [Artifact("ported", public_name(out), record.fingerprint)] if record.fingerprint else [],
        "artifacts": [out / PortRecord.FILE],
        "tags": {"portllm.task": record.task or ""},
    }


def of_verify(record: VerifyRecord) -> Result:
    """Return the result of verify: a ported directory that is what its record states."""
    proof, port = record.proof, record.record
    counts = {"identical": proof.identical, "recomputed": len(proof.recomputed)} if proof is not None else {}
    return {
        "metrics": {"files": len(port.files), **{f"tensors_{kind}": count for kind, count in counts.items()}},
        "reads": [
            *([Artifact("ported", record.folder, port.fingerprint)] if port.fingerprint else []),
            *_sources("checkpoint", port.base),
            *_sources("patch", port.patch),
        ],
        "tags": {"portllm.task": port.task or ""},
    }


def of_evaluation(result: Evaluation, out: Path) -> Result:
    """Return the result of evaluate: scores of a release and of patches on it."""
    arms = {s.patch: f"{s.arm}/{s.patch_task or 'bare'}" for s in result.scores}
    # two patches of one arm and task are distinguished by name
    names = {patch: arm if list(arms.values()).count(arm) == 1 else f"{arm}/{patch}" for patch, arm in arms.items()}
    scores = {f"{s.task}/{names[s.patch]}/{key}": v for s in result.scores for key, v in s.metrics.items()}
    marks = {s.patch: s.patch_fingerprint for s in result.scores if s.patch and s.patch_fingerprint}
    return {
        "metrics": scores,
        "reads": [
            Artifact("checkpoint", result.model, result.fingerprint),
            *(Artifact("patch", name, fingerprint) for name, fingerprint in marks.items()),
            *_files(result.data),
        ],
        "writes": [Artifact("result", public_name(out), *digests([out]).values())],
        "datasets": _used(result.data, "evaluation"),
        "artifacts": [out],
    }


def of_report(record: ReportRecord, out: Path, metrics: Path) -> Result:
    """Return the result of report: all arms in one page."""
    return {
        "metrics": _flat(record.metrics),
        "writes": [Artifact("result", public_name(metrics), *digests([metrics]).values())],
        "artifacts": [out, metrics],
    }


def of_register(record: RegisterRecord, ported: Path, out: Path | None) -> Result:
    """Return the result of register: the decisions on one release's ported models."""
    scores = {f"{d.task}/ported": d.ported_score for d in record.decisions}
    scores |= {f"{d.task}/base": d.base_score for d in record.decisions}
    return {
        "metrics": {**scores, "accepted": len(record.accepted)},
        "reads": [Artifact("ported", _checkpoint(ported, d).as_posix(), d.fingerprint) for d in record.decisions],
        "artifacts": [out] if out else [],
    }


def version_requests(record: RegisterRecord, ported: Path) -> list[VersionRequest]:
    """Return the accepted models as requests to the registry; those of a DVC experiment request no alias."""
    alias = None if DVC_EXPERIMENT in os.environ else record.alias
    return [
        VersionRequest(
            name=d.name,
            checkpoint=_checkpoint(ported, d),
            release=record.release,
            task=d.task,
            ported=d.fingerprint,
            base=d.base_fingerprint,
            patch=d.patch_fingerprint,
            metrics={d.metric: d.ported_score, f"base {d.metric}": d.base_score},
            alias=alias,
            description=d.reason,
        )
        for d in record.accepted
    ]


def _checkpoint(ported: Path, decision: Decision) -> Path:
    # `ported` is the one model itself, or the directory that contains it
    return ported if (ported / PortRecord.FILE).is_file() else ported / Path(decision.path).name


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def _sources(kind: Any, source: Source | None) -> list[Artifact]:
    return [Artifact(kind, source.name, source.fingerprint)] if source and source.fingerprint else []


def _files(digests: Mapping[str, str]) -> list[Artifact]:
    return [Artifact("dataset", name, digest) for name, digest in digests.items()]


def _used(digests: Mapping[str, str], context: Any) -> list[Dataset]:
    return [
        Dataset(name=name, digest=digest, source=f"data/{name}", context=context) for name, digest in digests.items()
    ]


def _dataset(out: Path, split: str, digest: str) -> Artifact:
    return Artifact("dataset", f"{out.name}/{split}.parquet", digest)
