"""evolve: the next release of a base, by continued pretraining on a corpus."""

from __future__ import annotations

from pathlib import Path

from portllm.checkpoint.fingerprint import fingerprint
from portllm.checkpoint.output import staged
from portllm.checkpoint.provenance import digests, git_commit, public_name, revision, versions
from portllm.checkpoint.records import ReleaseRecord, Source
from portllm.lm import pretraining
from portllm.params import EvolveParams, as_tree


def run(
    *,
    base: Path,
    corpus: Path,
    out: Path,
    params: EvolveParams,
    force: bool = False,
    on_metrics: pretraining.OnMetrics | None = None,
    on_progress: pretraining.OnProgress | None = None,
) -> ReleaseRecord:
    """Write to `out` what `base` becomes by reading `corpus`/train.parquet. Raises DataError and OutputError."""
    with staged(out, force=force, inputs=(base, corpus)) as folder:
        made = pretraining.continued(base, corpus, params, on_metrics=on_metrics, on_progress=on_progress)
        made.save(folder)
        record = ReleaseRecord(
            fingerprint=fingerprint(folder),
            base=Source(name=public_name(base), fingerprint=fingerprint(base), revision=revision(base)),
            data=digests([corpus / pretraining.TRAIN]),
            params={k: v for k, v in as_tree(params).items() if k != "releases"},
            probe=made.known(corpus),
            metrics=made.metrics,
            versions=versions("torch", "transformers", "peft"),
            git_commit=git_commit(),
        )
        record.write(folder)
    return record
