"""fetch and evolve: the first release of a base, and the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from portllm import params
from portllm.cli.launching import launchable_where
from portllm.cli.options import DIRECTORY, FORCE, OUT, apply, common, of_section
from portllm.cli.running import Common, Stage, answer, stage


def _pretrains(flags: Mapping[str, Any]) -> bool:
    """Return whether `fetch` trains a model."""
    from portllm.verbs.fetch import SCRATCH, WORLD

    return (flags["source"] or params.load(flags["params_file"]).fetch.source) in (WORLD, SCRATCH)


def _trains(flags: Mapping[str, Any]) -> bool:
    """Return whether `evolve` trains a model."""
    recipe = params.load(flags["params_file"]).evolve.recipe(flags["release"])
    return recipe is None or recipe.source is None


@click.command(short_help="The first release of a base.")
@click.argument("source", required=False)
@click.option("--corpus", type=DIRECTORY, help="Corpus to pretrain on (for the sources `world` and `scratch`).")
@OUT
@FORCE
@of_section("fetch", params.FetchParams, skip=("source",))
@launchable_where(_pretrains)
@common
def fetch(
    source: str | None,
    corpus: Path | None,
    out: Path,
    force: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """Fetch or train the first release: a hub id, a local directory, the embedded world's own, or one from scratch.

    A hub id is pinned to a commit, which release.json records; only safetensors are downloaded. `scratch` trains a
    tokenizer and a small Llama on the corpus.

    \b
    Examples:
      portllm fetch mistralai/Mistral-7B-v0.1 --out models/releases/v0
      portllm fetch mistralai/Mistral-7B-v0.1@main --out models/releases/v0
      portllm fetch world --corpus data/corpora/v0 --out models/releases/v0
      portllm fetch scratch --corpus data/corpora/v0 --out my-v0 --vocab-size 4096 --max-steps 2000
    """
    from portllm.lineage import of_release
    from portllm.verbs import fetch as verb

    section = apply(params.load(opts.params_file).fetch, {**flags, "source": source}, where="fetch")
    with stage("fetch", name=f"fetch {out.name}", section=section, opts=opts) as running:
        record = verb.run(
            corpus=corpus, out=out, params=section, force=force, training=_training(running),
            download=_download(running),
        )  # fmt: skip
        running.cost.update(release=out.name, trainable_parameters=int(record.metrics.get("trainable_parameters", 0)))
        running.finish(**of_release(record, out))
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {record.fingerprint}")


@click.command(short_help="The next release: trained further, or a real one.")
@click.option("--base", required=True, help="The previous release: a directory or hub-id[@revision].")
@click.option("--corpus", type=DIRECTORY, help="Directory with train.parquet (column `text`).")
@click.option("--release", help="Recipe in evolve.releases of params.yaml.")
@OUT
@FORCE
@of_section("evolve", params.EvolveParams, skip=("releases",))
@launchable_where(_trains)
@common
def evolve(
    base: str,
    corpus: Path | None,
    release: str | None,
    out: Path,
    force: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """Train the next release by continued pretraining: full-weight, or LoRA merged into the weights.

    With --release, by its recipe in evolve.releases of params.yaml: a recipe with a `source` takes that real release
    unchanged, and release.json records its changes against --base.

    \b
    Examples:
      portllm evolve --base models/releases/v0 --corpus data/corpora/v1 --out models/releases/v1
      portllm evolve --base models/releases/v0 --corpus data/corpora/v1 --out v1-lora --mode lora --lora-r 64
      portllm evolve --base models/releases/v0 --release v1 --params params.yaml --out models/releases/v1
    """
    from portllm.checkpoint.base.comparison import summary
    from portllm.checkpoint.files.output import refuse
    from portllm.lineage import of_release
    from portllm.verbs import evolve as verb

    section = apply(params.load(opts.params_file).evolve, flags, where="evolve")
    recipe = section.recipe(release)
    with stage("evolve", name=f"evolve {out.name}", section=section, opts=opts) as running:
        refuse(out, force=force, inputs=())  # before gigabytes of --base are downloaded
        record = verb.run(
            base=running.find(base), corpus=corpus, source=recipe.source if recipe else None,
            out=out, params=section, force=force, training=_training(running), download=_download(running),
        )  # fmt: skip
        if record.source is not None:
            running.close()
            running.note(f"{record.source.name} against {base}: {summary(record.changes)}")
        running.cost.update(release=out.name, trainable_parameters=int(record.metrics.get("trainable_parameters", 0)))
        running.finish(**of_release(record, out))
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {record.fingerprint}")


def _training(running: Stage) -> Any:
    from portllm.lm.learning.pretraining import TrainingCallbacks

    return TrainingCallbacks(
        on_metrics=running.metrics, on_progress=running.progress, on_note=running.note, on_cost=running.took
    )


def _download(running: Stage) -> Any:
    from portllm.lm.remote.releases import DownloadCallbacks

    return DownloadCallbacks(on_note=running.note, on_bytes=running.bytes)
