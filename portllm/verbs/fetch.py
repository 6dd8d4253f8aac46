"""fetch: the first release, pretrained in the embedded world, or copied from a directory or the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from portllm.checkpoint.files import companions
from portllm.checkpoint.fingerprint import fingerprint
from portllm.checkpoint.output import staged
from portllm.checkpoint.provenance import digests, git_commit, public_name, revision, versions
from portllm.checkpoint.reader import INDEX, shard_names
from portllm.checkpoint.records import ReleaseRecord, Source
from portllm.errors import DataError
from portllm.lm import pretraining
from portllm.lm.hub import resolve
from portllm.params import FetchParams, as_tree
from portllm.world import tokenizer

WORLD, SCRATCH = "world", "scratch"


def run(
    *,
    out: Path,
    params: FetchParams,
    corpus: Path | None = None,
    force: bool = False,
    on_metrics: pretraining.OnMetrics | None = None,
    on_progress: pretraining.OnProgress | None = None,
) -> ReleaseRecord:
    """Write the release named by `params.source` to `out`. Raises DataError, CheckpointError and OutputError.

    For `world` and `scratch`, a small Llama is pretrained from scratch on `corpus`/train.parquet, and asked what the
    world's tasks ask about (the base probe) before any patch exists; `scratch` learns its tokenizer there too.
    """
    if params.source not in (WORLD, SCRATCH):
        return _copy(resolve(params.source), out, force)
    if corpus is None:
        raise DataError(f"the first release of source {params.source} is pretrained; pass its corpus with --corpus DIR")
    with staged(out, force=force, inputs=(corpus,)) as folder:
        words = tokenizer.build() if params.source == WORLD else pretraining.own_tokenizer(corpus, params)
        made = pretraining.from_scratch(words, corpus, params, on_metrics=on_metrics, on_progress=on_progress)
        made.save(folder)
        record = ReleaseRecord(
            fingerprint=fingerprint(folder),
            data=digests([corpus / pretraining.TRAIN]),
            params=as_tree(params),
            probe=made.known(corpus),
            metrics=made.metrics,
            versions=versions("torch", "transformers"),
            git_commit=git_commit(),
        )
        record.write(folder)
    return record


def _copy(source: Path, out: Path, force: bool) -> ReleaseRecord:
    mark = fingerprint(source)
    with staged(out, force=force, inputs=(source,)) as folder:
        weights = [*shard_names(source), *(n for n in (INDEX,) if (source / n).is_file())]
        for name, path in {**{n: source / n for n in weights}, **companions(source, source)}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        record = ReleaseRecord(
            fingerprint=mark,
            base=Source(name=public_name(source), fingerprint=mark, revision=revision(source)),
            versions=versions(),
            git_commit=git_commit(),
        )
        record.write(folder)
    return record
