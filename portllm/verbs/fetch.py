"""fetch: make the first release, pretrained in the embedded world or from scratch, or copied from elsewhere."""

from __future__ import annotations

from pathlib import Path

from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.files.output import kept, refuse, staged
from portllm.checkpoint.record.provenance import digests, versions
from portllm.checkpoint.record.records import ReleaseRecord
from portllm.errors import DataError
from portllm.lm.learning import pretraining
from portllm.lm.remote import hub, releases
from portllm.params import FetchParams, as_tree
from portllm.world import tokenizer

WORLD, SCRATCH = "world", "scratch"


def run(
    *,
    out: Path,
    params: FetchParams,
    corpus: Path | None = None,
    force: bool = False,
    training: pretraining.TrainingCallbacks | None = None,
    download: releases.DownloadCallbacks | None = None,
) -> ReleaseRecord:
    """Write the release named by `params.source` to `out`.

    For `world` and `scratch`, a small Llama is pretrained from scratch on `corpus`/train.parquet and scored on the
    facts of the world's tasks (the base probe) before any patch exists; `scratch` trains its tokenizer there, too.
    Any other source is a directory or `hub-id[@revision]`, which is copied.
    Raises DataError, CheckpointError, ParamsError, MachineError and OutputError.
    """
    if params.source not in (WORLD, SCRATCH):
        return _real(out, params, force, download or releases.DownloadCallbacks())
    if corpus is None:
        raise DataError(f"the first release of source {params.source} is pretrained; pass its corpus with --corpus DIR")
    return _pretrained(out, params, corpus, force, training or pretraining.TrainingCallbacks())


def _pretrained(
    out: Path, params: FetchParams, corpus: Path, force: bool, callbacks: pretraining.TrainingCallbacks
) -> ReleaseRecord:
    data = digests([corpus / pretraining.TRAIN])
    key = pretraining.key(None, data, params)
    with staged(out, force=force, inputs=(corpus,), key=key) as folder:
        words = tokenizer.build() if params.source == WORLD else pretraining.own_tokenizer(corpus, params)
        checkpoints = kept(out, key) if key else None
        release = pretraining.from_scratch(words, corpus, params, callbacks.with_checkpoints(checkpoints))
        release.save(folder)
        record = ReleaseRecord(
            fingerprint=release.fingerprint(folder),
            data=data,
            params=as_tree(params),
            probe=release.probe(corpus),
            metrics=release.metrics,
            versions=versions("torch", "transformers"),
        )
        record.write(folder)
    return record


def _real(out: Path, params: FetchParams, force: bool, callbacks: releases.DownloadCallbacks) -> ReleaseRecord:
    refuse(out, force=force, inputs=())  # before gigabytes are downloaded
    release = releases.find(params.source, callbacks)
    with staged(out, force=force, inputs=(release,)) as folder:
        source = releases.copy(release, folder, callbacks)
        record = ReleaseRecord(
            fingerprint=fingerprint(folder),
            source=source,
            # a directory's name has a meaning on this machine only
            params={"source": params.source} if hub.is_hub_id(params.source) else {},
            versions=versions("huggingface_hub"),
        )
        record.write(folder)
    return record
