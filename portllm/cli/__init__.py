"""The command line: one thin command per verb; nothing heavy is imported before a command runs.

__init__.py   the commands, in the order of the pipeline
options.py    flags generated from the sections of params.py
running.py    progress, tracking, cost and the JSON object, shared by every command
lineage.py    what each verb read and wrote, for the tracker
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from portllm import __version__, params
from portllm.cli.options import COMMA_LIST, DIRECTORY, apply, of_section
from portllm.cli.running import Common, Settings, Verbs, answer, measured, stage

Command = TypeVar("Command", bound=Callable[..., Any])

JSON = click.option("--json", "as_json", is_flag=True, help="Exactly one JSON object on stdout.")
PARAMS = click.option(
    "--params", "params_file", type=DIRECTORY, help="params.yaml to read the section of this verb from."
)
COST = click.option("--cost", type=DIRECTORY, help="Write seconds and peak memory of this call to this JSON file.")
FORCE = click.option("--force", is_flag=True, help="Replace OUT when it exists.")
OUT = click.option(
    "--out", type=DIRECTORY, required=True, help="Directory to write; it appears complete or not at all."
)
TRUST = click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")


def common(command: Command) -> Command:
    """The options of every pipeline verb, handed to it as one `opts`."""

    @functools.wraps(command)
    def bundled(*, params_file: Path | None, cost: Path | None, as_json: bool, **rest: Any) -> Any:
        return command(opts=Common(params_file=params_file, cost=cost, as_json=as_json), **rest)

    for option in (JSON, COST, PARAMS):
        bundled = option(bundled)
    return cast(Command, bundled)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="portllm")
@click.option("-v", "--verbose", count=True, help="Say more; twice: a traceback on errors.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes, errors only.")
@click.option("--track/--no-track", default=None, help="Record in MLflow [default: inside a pipeline only].")
@click.pass_context
def main(ctx: click.Context, verbose: int, quiet: bool, track: bool | None) -> None:
    """Move a LoRA patch to the next release of its base model, without training.

    \b
    Examples:
      portllm port my-patch --onto new-base --out ported
      portllm evaluate new-base --patch my-patch --tasks boolq --out scores.json
      portllm fingerprint new-base
    """
    ctx.obj = Settings(verbose=verbose, quiet=quiet, track=track)


@main.command()
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
      portllm prepare corpus_v1 --out data/corpus_v1 --seed 7
    """
    from portllm.cli.lineage import of_dataset
    from portllm.verbs import prepare as verb

    section = apply(params.load(opts.params_file).prepare, flags, where="prepare")
    with stage("prepare", name=f"prepare {dataset}", section=section, opts=opts) as running:
        record = verb.run(dataset=dataset, out=out, params=section, force=force)
        running.finish(**of_dataset(record, out))
    rows = ", ".join(f"{n} {split}" for split, n in record.rows.items())
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {rows} rows")


@main.command()
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
      portllm fetch world --corpus data/corpus_v0 --out models/releases/v0
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


@main.command()
@click.option("--base", required=True, help="The release before: a directory or hub-id[@revision].")
@click.option("--corpus", type=DIRECTORY, required=True, help="Directory with train.parquet (column `text`).")
@OUT
@FORCE
@of_section("evolve", params.EvolveParams, skip=("releases",))
@common
def evolve(base: str, corpus: Path, out: Path, force: bool, opts: Common, **flags: Any) -> None:
    """The next release by continued pretraining: full-weight, or LoRA merged into the weights.

    \b
    Examples:
      portllm evolve --base models/releases/v0 --corpus data/corpus_v1 --out models/releases/v1
      portllm evolve --base models/releases/v0 --corpus data/corpus_v1 --out v1-lora --mode lora --lora-r 64
    """
    from portllm.cli.lineage import of_release
    from portllm.lm.hub import resolve
    from portllm.verbs import evolve as verb

    section = apply(params.load(opts.params_file).evolve, flags, where="evolve")
    with stage("evolve", name=f"evolve {out.name}", section=section, opts=opts) as running:
        record = verb.run(
            base=resolve(base), corpus=corpus, out=out, params=section, force=force,
            on_metrics=running.metrics, on_progress=running.progress,
        )  # fmt: skip
        running.cost.update(release=out.name, trainable_parameters=int(record.metrics["trainable_parameters"]))
        running.finish(**of_release(record, out))
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {record.fingerprint}")


@main.command()
@click.option("--base", required=True, help="The release to personalise: a directory or hub-id[@revision].")
@click.option("--task", required=True, help="Name of the task (see `portllm tasks`).")
@click.option(
    "--data", type=DIRECTORY, default=Path("data"), show_default=True, help="Directory of DATA/<task>/<split>.parquet."
)
@OUT
@FORCE
@of_section("train", params.TrainParams)
@common
def train(
    base: str,
    task: str,
    data: Path,
    out: Path,
    force: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """A LoRA patch of a base on a task; the loss covers the answer only.

    \b
    Examples:
      portllm train --base models/releases/v0 --task world_boolq --out models/patches/v0/world_boolq
      portllm train --base models/releases/v0 --task world_sst2 --out my-patch --lora-r 4 --max-steps 100
    """
    from portllm.cli.lineage import of_patch
    from portllm.lm.hub import resolve
    from portllm.verbs import train as verb

    section = apply(params.load(opts.params_file).train.for_task(task), flags, where="train")
    name = f"train {out.parent.name}/{out.name}"
    with stage("train", name=name, section=section, opts=opts) as running:
        record = verb.run(
            base=resolve(base), task=task, data=data, out=out, params=section, force=force,
            on_metrics=running.metrics, on_progress=running.progress,
        )  # fmt: skip
        running.cost.update(release=out.parent.name, task=task)
        running.cost["trainable_parameters"] = int(record.metrics["trainable_parameters"])
        running.finish(**of_patch(record, out))
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {record.fingerprint}")


@main.command()
@click.argument("patch")
@click.option(
    "--onto", required=True, metavar="BASE", help="The release to port onto: a directory or hub-id[@revision]."
)
@click.option("--from", "source", metavar="OLD", help="The base the patch was trained on; its identity is checked.")
@click.option("--dry-run", is_flag=True, help="Print the plan, checked whole, and write nothing.")
@OUT
@FORCE
@of_section("port", params.PortParams)
@common
def port(
    patch: str,
    onto: str,
    source: str | None,
    dry_run: bool,
    out: Path,
    force: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """Put a patch onto another release of its base, with no training and no data.

    \b
    Examples:
      portllm port my-patch --onto mistralai/Mistral-7B-v0.3 --out ported
      portllm port my-patch --onto new-base --out retargeted --as adapter
      portllm port my-patch --onto new-base --from old-base --out ported --json
    """
    from portllm.cli.lineage import of_port
    from portllm.lm.hub import resolve
    from portllm.verbs import port as verb

    section = apply(params.load(opts.params_file).port, flags, where="port")
    name = f"port {out.parent.name}/{out.name}"
    with stage("port", name=name, section=section, opts=opts) as running:
        record = verb.run(
            patch=resolve(patch), onto=resolve(onto), source=resolve(source) if source else None, out=out,
            params=section, force=force, dry_run=dry_run, on_progress=running.bytes,
        )  # fmt: skip
        running.cost.update(release=out.parent.name, task=record.task, trainable_parameters=0)
        running.finish(**({} if dry_run else of_port(record, out)))
    told = {
        "out": str(out), "as": record.output, "method": record.method, "scale": record.scale,
        "modules": record.modules, "tensors": record.tensors, "bytes": running.bytes_done, **measured(),
        "base": {"fingerprint": record.base.fingerprint},
        "patch": {
            "fingerprint": record.patch.fingerprint,
            "trained_on": record.trained_on.fingerprint if record.trained_on else None,
        },
    }  # fmt: skip
    matched, changed = record.modules["matched"], record.tensors["changed"]
    line = f"{out}: {matched} of {record.modules['total']} modules, {changed} tensors changed"
    answer(told, as_json=opts.as_json, line=line)


@main.command()
@click.argument("model")
@click.option("--tasks", type=COMMA_LIST, help="Task names, parted by commas [default: `tasks` of --params].")
@click.option(
    "--patch", "patches", multiple=True, type=DIRECTORY, help="A patch or ported model, or a directory of them."
)
@click.option(
    "--before", multiple=True, type=DIRECTORY, help="Models of an earlier release, asked what no patch is for."
)
@click.option(
    "--data", type=DIRECTORY, default=Path("data"), show_default=True, help="Directory of DATA/<task>/<split>.parquet."
)
@click.option("--out", type=DIRECTORY, required=True, help="JSON file to write.")
@click.option("--news", type=DIRECTORY, help="A release's corpus: are its facts known, is its text expected?")
@click.option("--samples", type=DIRECTORY, help="Parquet file to write each example's answer to.")
@TRUST
@of_section("evaluate", params.EvaluateParams)
@common
def evaluate(
    model: str,
    tasks: list[str] | None,
    news: Path | None,
    patches: tuple[Path, ...],
    before: tuple[Path, ...],
    data: Path,
    out: Path,
    samples: Path | None,
    trust_remote_code: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """Score a model and patches over it with the LM Evaluation Harness; many patches, one loaded base.

    \b
    Examples:
      portllm evaluate new-base --patch my-patch --patch ported --tasks boolq,sst2 --out scores.json
      portllm evaluate models/releases/v1 --patch models/ported/v1 --tasks world_boolq --out v1.json --limit 100
    """
    from portllm.cli.lineage import of_evaluation
    from portllm.lm.hub import resolve
    from portllm.verbs import evaluate as verb

    whole = params.load(opts.params_file)
    section = apply(whole.evaluate, flags, where="evaluate")
    with stage("evaluate", name=f"evaluate {out.stem}", section=section, opts=opts) as running:
        result = verb.run(
            model=resolve(model), tasks=tasks or whole.tasks, patches=patches, before=before, data=data, news=news,
            out=out, samples=samples,
            params=section, trust_remote_code=trust_remote_code, on_progress=running.part,
        )  # fmt: skip
        running.cost.update(release=out.stem)
        running.finish(**of_evaluation(result, out))
    answer(result.as_json(), as_json=opts.as_json, line="\n".join(result.lines()))


@main.command()
@click.option(
    "--models", type=DIRECTORY, default=Path("models"), show_default=True, help="releases/, patches/ and ported/."
)
@click.option("--results", type=DIRECTORY, default=Path("results"), show_default=True, help="evaluate/ and cost/.")
@click.option(
    "--metrics", type=DIRECTORY, default=Path("results/metrics.json"), show_default=True, help="JSON to write."
)
@click.option(
    "--plots", type=DIRECTORY, default=Path("results/plots"), show_default=True, help="CSV directory to write."
)
@OUT
@FORCE
@of_section("report", params.ReportParams)
@common
def report(
    models: Path,
    results: Path,
    metrics: Path,
    plots: Path,
    out: Path,
    force: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """Tables and plots of all arms, as Markdown and one self-contained HTML page.

    \b
    Example:
      portllm report --params params.yaml --out results/report --force
    """
    from portllm.cli.lineage import of_report
    from portllm.verbs import report as verb

    whole = params.load(opts.params_file)
    whole = dataclasses.replace(whole, report=apply(whole.report, flags, where="report"))
    with stage("report", name="report", section=whole.report, opts=opts) as running:
        record = verb.run(
            params=whole, models=models, evaluated=results / "evaluate", costs=results / "cost",
            out=out, metrics=metrics, plots=plots, force=force,
        )  # fmt: skip
        running.finish(**of_report(record, out))
    answer(dataclasses.asdict(record), as_json=opts.as_json, line=f"{out / 'report.html'}")


@main.command()
@click.argument("ported", type=DIRECTORY)
@click.option("--results", type=DIRECTORY, required=True, help="What `evaluate` wrote for that release.")
@click.option("--out", type=DIRECTORY, help="JSON file to write the decisions to.")
@of_section("register", params.RegisterParams)
@common
def register(ported: Path, results: Path, out: Path | None, opts: Common, **flags: Any) -> None:
    """Register ported models that beat their release's base arm in the MLflow model registry.

    \b
    Examples:
      portllm register models/ported/v1/world_boolq --results results/evaluate/v1.json --name my-boolq
      portllm register models/ported/v1 --results results/evaluate/v1.json --name "portllm-{task}"
    """
    raise NotImplementedError


@main.command()
@click.argument("path")
@JSON
def fingerprint(path: str, as_json: bool) -> None:
    """One hex digest of a checkpoint's or patch's tensors, the same however they are sharded or ordered.

    \b
    Example:
      portllm fingerprint mistralai/Mistral-7B-v0.1
    """
    from portllm.lm.hub import resolve
    from portllm.verbs import fingerprint as verb

    digest = verb.run(path=resolve(path))
    answer({"path": path, "fingerprint": digest}, as_json=as_json, line=digest)


@main.command()
@click.option("--all", "everything", is_flag=True, help="The harness's own tasks too (some seconds).")
@JSON
def tasks(everything: bool, as_json: bool) -> None:
    """The tasks known: the embedded world's, and the LM Evaluation Harness's own."""
    from portllm.verbs import tasks as verb

    names = verb.run(everything=everything)
    answer({"tasks": names}, as_json=as_json, line="\n".join(names))
