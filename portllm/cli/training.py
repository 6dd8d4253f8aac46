"""train: a patch of a base on a task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from portllm import params
from portllm.cli.launching import launchable
from portllm.cli.options import DIRECTORY, FORCE, OUT, apply, common, of_section
from portllm.cli.running import Common, answer, place, stage


@click.command(short_help="A LoRA patch of a base on a task.")
@click.option("--base", required=True, help="The release to personalise: a directory or hub-id[@revision].")
@click.option("--task", required=True, help="Name of the task (see `portllm tasks`).")
@click.option(
    "--data", type=DIRECTORY, help="Directory of DATA/<task>/<split>.parquet [default: data/tasks, else data]."
)
@OUT
@FORCE
@of_section("train", params.TrainParams)
@launchable
@common
def train(
    base: str,
    task: str,
    data: Path | None,
    out: Path,
    force: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """A LoRA patch of a base on a task; the loss covers the answer only.

    \b
    Examples:
      portllm train --base models/releases/v0 --task world_boolq --data data/tasks --out my-patch
      portllm train --base new-base --task world_sst2 --data data/tasks --out r4 --lora-r 4 --max-steps 100
      portllm train --launch configs/accelerate/gpus-ddp.yaml --base models/releases/v0 --task sst2 --out my-patch
    """
    from portllm.lineage import of_patch
    from portllm.verbs import train as verb

    section = apply(params.load(opts.params_file).train.for_task(task), flags, where="train")
    name = f"train {place(out)}"
    with stage("train", name=name, section=section, opts=opts) as running:
        record = verb.run(
            base=running.find(base), task=task, data=data, out=out, params=section, force=force,
            on_metrics=running.metrics, on_progress=running.progress, on_cost=running.took, on_note=running.note,
        )  # fmt: skip
        running.cost.update(release=out.parent.name, task=task)
        running.cost["trainable_parameters"] = int(record.metrics["trainable_parameters"])
        running.finish(**of_patch(record, out))
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {record.fingerprint}")
