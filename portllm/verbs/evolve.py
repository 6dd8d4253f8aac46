"""evolve: the next release of a base, by continued pretraining on a corpus, or a real release as it is."""

from __future__ import annotations

from pathlib import Path

from portllm.checkpoint.base.comparison import changes
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.files.output import kept, refuse, staged
from portllm.checkpoint.record.provenance import digests, public_name, revision, versions
from portllm.checkpoint.record.records import ReleaseRecord, Source
from portllm.errors import DataError
from portllm.lm.learning import pretraining
from portllm.lm.remote import hub, releases
from portllm.params import EvolveParams, as_tree


def run(
    *,
    base: Path,
    out: Path,
    params: EvolveParams,
    corpus: Path | None = None,
    source: str | None = None,
    force: bool = False,
    training: pretraining.TrainingCallbacks | None = None,
    download: releases.DownloadCallbacks | None = None,
) -> ReleaseRecord:
    """Write to `out` the release of `base` trained on `corpus`/train.parquet, or the real release `source`.

    A real release is fetched as it is; what it changed against `base` is recorded. Raises DataError, CheckpointError,
    ParamsError, MachineError and OutputError.
    """
    if source is not None:
        return _real(base, out, source, force, download or releases.DownloadCallbacks())
    if corpus is None:
        raise DataError("a release is trained on a corpus; pass it with --corpus DIR, or set evolve.releases.X.source")
    return _trained(base, out, params, corpus, force, training or pretraining.TrainingCallbacks())


def _trained(
    base: Path, out: Path, params: EvolveParams, corpus: Path, force: bool, callbacks: pretraining.TrainingCallbacks
) -> ReleaseRecord:
    data = digests([corpus / pretraining.TRAIN])
    key = pretraining.key(base, data, params)
    with staged(out, force=force, inputs=(base, corpus), key=key) as folder:
        checkpoints = kept(out, key) if key else None
        release = pretraining.continued(base, corpus, params, callbacks.with_checkpoints(checkpoints))
        release.save(folder)
        source = _source(base)
        record = ReleaseRecord(
            fingerprint=release.fingerprint(folder),
            base=source,
            data=data,
            params={k: v for k, v in as_tree(params).items() if k != "releases"},
            probe=release.probe(corpus),
            metrics=release.metrics,
            versions=versions("torch", "transformers", "peft"),
        )
        record.write(folder)
        if record.fingerprint == source.fingerprint:
            callbacks.on_note("the release equals its base: no weight changed; raise optim.learning_rate or max_steps")
    return record


def _real(base: Path, out: Path, source: str, force: bool, callbacks: releases.DownloadCallbacks) -> ReleaseRecord:
    refuse(out, force=force, inputs=(base,))  # before gigabytes come
    found = releases.find(source, callbacks)
    differs = changes(base, found)
    with staged(out, force=force, inputs=(base, found)) as folder:
        origin = releases.copy(found, folder, callbacks)
        record = ReleaseRecord(
            fingerprint=fingerprint(folder),
            base=_source(base),
            source=origin,
            changes=differs,
            params={"source": source} if hub.is_hub_id(source) else {},
            versions=versions("huggingface_hub"),
        )
        record.write(folder)
    return record


def _source(base: Path) -> Source:
    return Source(name=public_name(base), fingerprint=fingerprint(base), revision=revision(base))
