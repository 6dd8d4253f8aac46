"""fetch and evolve: the first release of a base, and the next."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from portllm import params
from portllm.cli.options import DIRECTORY, FORCE, OUT, apply, common, of_section
from portllm.cli.running import Common, answer, stage


@click.command(short_help="The first release of a base.")
@click.argument("source", required=False)
@click.option("--corpus", type=DIRECTORY, help="Corpus of the embedded world's first release (for the source `world`).")
@OUT
@FORCE
@of_section("fetch", params.FetchParams, skip=("source",))
@common
def fetch(
    source: str | None,
    corpus: Path | None,
    out: Path,
    force: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """The first release: a hub id at a pinned revision, a local directory, or the embedded world's own.

    \b
    Examples:
      portllm fetch mistralai/Mistral-7B-v0.1 --out models/releases/v0
      portllm fetch world --corpus data/corpora/v0 --out models/releases/v0
    """
    from portllm.cli.lineage import of_release
    from portllm.verbs import fetch as verb

    section = apply(params.load(opts.params_file).fetch, {**flags, "source": source}, where="fetch")
    with stage("fetch", name=f"fetch {out.name}", section=section, opts=opts) as running:
        record = verb.run(
            corpus=corpus,
            out=out,
            params=section,
            force=force,
            on_metrics=running.metrics,
            on_progress=running.progress,
        )
        running.cost.update(release=out.name, trainable_parameters=int(record.metrics.get("trainable_parameters", 0)))
        running.finish(**of_release(record, out))
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {record.fingerprint}")


@click.command(short_help="The next release, by continued pretraining.")
@click.option("--base", required=True, help="The release before: a directory or hub-id[@revision].")
@click.option("--corpus", type=DIRECTORY, required=True, help="Directory with train.parquet (column `text`).")
@click.option("--release", help="Recipe to take of evolve.releases in params.yaml.")
@OUT
@FORCE
@of_section("evolve", params.EvolveParams, skip=("releases",))
@common
def evolve(base: str, corpus: Path, release: str | None, out: Path, force: bool, opts: Common, **flags: Any) -> None:
    """The next release by continued pretraining: full-weight, or LoRA merged into the weights.

    \b
    Examples:
      portllm evolve --base models/releases/v0 --corpus data/corpora/v1 --out models/releases/v1
      portllm evolve --base models/releases/v0 --corpus data/corpora/v1 --out v1-lora --mode lora --lora-r 64
    """
    from portllm.cli.lineage import of_release
    from portllm.lm.hub import resolve
    from portllm.verbs import evolve as verb

    section = apply(params.load(opts.params_file).evolve, flags, where="evolve")
    section.recipe(release)
    with stage("evolve", name=f"evolve {out.name}", section=section, opts=opts) as running:
        record = verb.run(
            base=resolve(base), corpus=corpus, out=out, params=section, force=force,
            on_metrics=running.metrics, on_progress=running.progress,
        )  # fmt: skip
        running.cost.update(release=out.name, trainable_parameters=int(record.metrics["trainable_parameters"]))
        running.finish(**of_release(record, out))
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {record.fingerprint}")
