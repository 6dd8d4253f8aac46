"""prepare and tasks: what patches are trained on and models asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from portllm import params
from portllm.cli.options import FORCE, JSON, OUT, apply, common, of_section
from portllm.cli.running import Common, answer, stage


@click.command(short_help="A task's data, or a release's corpus.")
@click.argument("dataset")
@OUT
@FORCE
@of_section("prepare", params.PrepareParams)
@common
def prepare(dataset: str, out: Path, force: bool, opts: Common, **flags: Any) -> None:
    """A task's data, or a release's corpus, as parquet splits in the hub's columns.

    \b
    Examples:
      portllm prepare world_boolq --out data/world_boolq
      portllm prepare corpus_v1 --out data/corpora/v1 --seed 7
    """
    from portllm.cli.lineage import of_dataset
    from portllm.verbs import prepare as verb

    section = apply(params.load(opts.params_file).prepare, flags, where="prepare")
    with stage("prepare", name=f"prepare {dataset}", section=section, opts=opts) as running:
        record = verb.run(dataset=dataset, out=out, params=section, force=force)
        running.finish(**of_dataset(record, out))
    rows = ", ".join(f"{n} {split}" for split, n in record.rows.items())
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {rows} rows")


@click.command(short_help="The tasks known.")
@click.option("--all", "everything", is_flag=True, help="The harness's own tasks too (some seconds).")
@JSON
def tasks(everything: bool, as_json: bool) -> None:
    """The tasks known: the embedded world's, and the LM Evaluation Harness's own.

    \b
    Example:
      portllm tasks --all
    """
    from portllm.verbs import tasks as verb

    names = verb.run(everything=everything)
    answer({"tasks": names}, as_json=as_json, line="\n".join(names))
