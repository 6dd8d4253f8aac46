"""prepare and tasks: the data of training and evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from portllm import params
from portllm.cli.options import FORCE, JSON, OUT, apply, common, of_section
from portllm.cli.running import Common, answer, stage

# the counts in dataset.json, for people
DECISIONS: Mapping[str, str] = {
    "beyond_limit": "{} rows left out: the limit",
    "byte_order_marks": "{} files start with a byte order mark: removed",
    "columns_not_used": "{} columns are not used: left out",
    "duplicates": "{} training rows repeat another one: kept",
    "empty": "{} rows have no prompt or no answer: left out",
    "files_not_used": "{} files belong to no split of the task: not read",
    "held_out": "{} rows held out for validation and test",
    "message_keys_not_used": "{} messages have keys other than role and content (tool calls …): left out",
    "overlap": "{} training rows have the question of an evaluation row: left out",
    "overlap_asked": "{} test rows have the question of a validation row: kept",
    "overlap_kept": "{} training rows have the question of an evaluation row: kept, as the definition generates rows",
    "spaces_added": "{} completions get a leading space, which separates them from their prompt",
}


@click.command(short_help="A task's data, or a release's corpus.")
@click.argument("dataset")
@OUT
@FORCE
@of_section("prepare", params.PrepareParams)
@common
def prepare(dataset: str, out: Path, force: bool, opts: Common, **flags: Any) -> None:
    """A task's data, or a release's corpus, as parquet splits in the hub's columns.

    DATASET is a task of the embedded world or of the LM Evaluation Harness, a name of your own, or corpus_RELEASE.
    Data are read from --data DIR (DIR/DATASET/<split>.parquet, .jsonl or .csv), else from the hub at one commit.
    Your own rows have the columns prompt and completion, or messages; a single DIR/DATASET.jsonl is split at random.
    `train` and `evaluate` look for prepared data in data/tasks, then in data, unless --data is passed.

    \b
    Examples:
      portllm prepare world_boolq --out data/tasks/world_boolq
      portllm prepare sst2 --out data/tasks/sst2
      portllm prepare tickets --data mine --out data/tasks/tickets
      portllm prepare corpus_v1 --out data/corpora/v1 --seed 7
    """
    from portllm.lineage import of_dataset
    from portllm.verbs import prepare as verb

    tree = params.load(opts.params_file)
    section = apply(tree.prepare, flags, where="prepare")
    with stage("prepare", name=f"prepare {dataset}", section=section, opts=opts) as running:
        record = verb.run(dataset=dataset, out=out, params=section, text=verb.text_of(tree, dataset), force=force)
        running.finish(**of_dataset(record, out))
        for name, count in record.decisions.items():
            running.note(f"{dataset}: {DECISIONS[name].format(count)}")
    rows = ", ".join(f"{n} {split}" for split, n in record.rows.items()) or "no"
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {rows} rows")


@click.command(short_help="List the tasks.")
@click.option("--all", "everything", is_flag=True, help="All tasks of the harness (takes a second or more).")
@JSON
def tasks(everything: bool, as_json: bool) -> None:
    """List the tasks: the embedded world's and the paper's, or all of the LM Evaluation Harness's.

    \b
    Example:
      portllm tasks --all
    """
    from portllm.verbs import tasks as verb

    listed = verb.run(everything=everything)
    width = max(len(one.task) for one in listed)
    lines = [f"{one.task:{width}}  {one.output_type:22} {'' if one.trainable else 'evaluation only'}" for one in listed]
    answer(
        {"tasks": [dataclasses.asdict(one) for one in listed]},
        as_json=as_json,
        line="\n".join(line.rstrip() for line in lines),
    )
