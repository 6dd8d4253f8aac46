"""evaluate: a model and patches over it, scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from portllm import params, processes
from portllm.cli.launching import launchable
from portllm.cli.options import COMMA_LIST, DIRECTORY, TRUST, apply, common, of_section
from portllm.cli.running import Common, answer, stage


@click.command(short_help="Score a model and patches over it.")
@click.argument("model")
@click.option("--tasks", type=COMMA_LIST, help="Task names, separated by commas [default: `tasks` of --params].")
@click.option(
    "--patch", "patches", multiple=True, type=DIRECTORY, help="A patch or ported model, or a directory of them."
)
@click.option(
    "--own-task",
    is_flag=True,
    help="Score a patch whose record names its task on that task, and on those that no patch is for, only.",
)
@click.option(
    "--before", multiple=True, type=DIRECTORY, help="Models of an earlier release, scored on what no patch is for."
)
@click.option(
    "--data", type=DIRECTORY, help="Directory of DATA/<task>/<split>.parquet [default: data/tasks, else data]."
)
@click.option("--out", type=DIRECTORY, required=True, help="JSON file to write.")
@click.option("--news", type=DIRECTORY, help="A release's corpus: does the model recall its facts, expect its text?")
@click.option("--samples", type=DIRECTORY, help="Parquet file to write each example's answer to.")
@click.option(
    "--cache/--no-cache", default=True, help="Take scores from the cache where they are in it [default: yes]."
)
@TRUST
@of_section("evaluate", params.EvaluateParams)
@launchable
@common
def evaluate(
    model: str,
    tasks: list[str] | None,
    news: Path | None,
    patches: tuple[Path, ...],
    own_task: bool,
    before: tuple[Path, ...],
    data: Path | None,
    out: Path,
    samples: Path | None,
    cache: bool,
    trust_remote_code: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """Score a model and patches over it with the LM Evaluation Harness; many patches, one loaded base.

    Every patch is scored on every task.

    \b
    Examples:
      portllm evaluate new-base --patch my-patch --patch ported --tasks boolq,sst2 --out scores.json
      portllm evaluate models/releases/v1 --patch models/ported/v1 --tasks world_boolq --data data/tasks --out v1.json
      portllm evaluate new-base --launch configs/accelerate/gpus-ddp.yaml --tasks boolq --out scores.json
    """
    from portllm.lineage import of_evaluation
    from portllm.verbs import evaluate as verb

    project = params.load(opts.params_file)
    section = apply(project.evaluate, flags, where="evaluate")
    with stage("evaluate", name=f"evaluate {out.stem}", section=section, opts=opts) as running:
        result = verb.run(
            model=running.find(model), tasks=tasks or project.tasks, patches=patches, own_task=own_task, before=before,
            data=data, news=news, out=out, samples=samples, params=section, cache=cache,
            trust_remote_code=trust_remote_code,
            on_progress=lambda done, total, what: running.progress(done, total, what, unit="documents"),
            on_note=running.note,
        )  # fmt: skip
        running.cost.update(release=out.stem, cached=result.cached)
        if cache:
            running.part(result.cached, len(result.scores), "from the cache")
        if processes.is_main():  # the others may be here before OUT is
            running.finish(**of_evaluation(result, out))
    answer(result.as_json(), as_json=opts.as_json, line="\n".join(result.lines()))
