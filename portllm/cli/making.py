"""The verbs that make things: data, releases, patches, ported models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from portllm import params
from portllm.cli.options import DIRECTORY, FORCE, OUT, apply, common, of_section
from portllm.cli.running import Common, answer, measured, place, stage

if TYPE_CHECKING:
    from portllm.checkpoint.plan import Plan
    from portllm.checkpoint.records import PortRecord


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
@OUT
@FORCE
@of_section("evolve", params.EvolveParams, skip=("releases",))
@common
def evolve(base: str, corpus: Path, out: Path, force: bool, opts: Common, **flags: Any) -> None:
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
    with stage("evolve", name=f"evolve {out.name}", section=section, opts=opts) as running:
        record = verb.run(
            base=resolve(base), corpus=corpus, out=out, params=section, force=force,
            on_metrics=running.metrics, on_progress=running.progress,
        )  # fmt: skip
        running.cost.update(release=out.name, trainable_parameters=int(record.metrics["trainable_parameters"]))
        running.finish(**of_release(record, out))
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {record.fingerprint}")


@click.command(short_help="A LoRA patch of a base on a task.")
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
      portllm train --base models/releases/v0 --task world_boolq --data data/tasks --out my-patch
      portllm train --base new-base --task world_sst2 --data data/tasks --out r4 --lora-r 4 --max-steps 100
    """
    from portllm.cli.lineage import of_patch
    from portllm.lm.hub import resolve
    from portllm.verbs import train as verb

    section = apply(params.load(opts.params_file).train.for_task(task), flags, where="train")
    name = f"train {place(out)}"
    with stage("train", name=name, section=section, opts=opts) as running:
        record = verb.run(
            base=resolve(base), task=task, data=data, out=out, params=section, force=force,
            on_metrics=running.metrics, on_progress=running.progress,
        )  # fmt: skip
        running.cost.update(release=out.parent.name, task=task)
        running.cost["trainable_parameters"] = int(record.metrics["trainable_parameters"])
        running.finish(**of_patch(record, out))
    answer({"out": str(out), **dataclasses.asdict(record)}, as_json=opts.as_json, line=f"{out}: {record.fingerprint}")


@click.command(short_help="Put a patch onto another release, without training.")
@click.argument("patch")
@click.option(
    "--onto", required=True, metavar="BASE", help="The release to port onto: a directory or hub-id[@revision]."
)
@click.option("--from", "source", metavar="OLD", help="The base the patch was trained on; its identity is checked.")
@click.option("--dry-run", is_flag=True, help="Check everything, print what each tensor would become, write nothing.")
@click.option("--push-to-hub", metavar="REPO", help="Upload OUT to this model repository (OWNER/NAME) when it is done.")
@click.option("--private", is_flag=True, help="The repository is to be private.")
@click.option("--revision", metavar="BRANCH", help="Branch of the repository to push to [default: main].")
@OUT
@FORCE
@of_section("port", params.PortParams)
@common
def port(
    patch: str,
    onto: str,
    source: str | None,
    dry_run: bool,
    push_to_hub: str | None,
    private: bool,
    revision: str | None,
    out: Path,
    force: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """Put a patch onto another release of its base, with no training and no data.

    Pushing uses the token of `hf auth login` or HF_TOKEN. When a push fails, OUT stays: the same command again pushes
    it without porting again.

    \b
    Examples:
      portllm port my-patch --onto mistralai/Mistral-7B-v0.3 --out ported
      portllm port my-patch --onto new-base --out retargeted --as adapter
      portllm port my-patch --onto new-base --from old-base --out ported --json
      portllm port my-patch --onto new-base --out ported --dry-run
      portllm port my-patch --onto new-base --out ported --push-to-hub me/my-model --private
    """
    from portllm import api
    from portllm.cli import plans
    from portllm.cli.lineage import of_port
    from portllm.lm.publishing import Destination

    if push_to_hub is None and (private or revision is not None):
        raise click.UsageError("--private and --revision go with --push-to-hub.")
    hub = Destination(push_to_hub, private, revision) if push_to_hub is not None else None
    if hub is not None:
        hub.check()
    planned: list[Plan] = []
    section = apply(params.load(opts.params_file).port, flags, where="port")
    name = f"port {place(out)}"
    with stage("port", name=name, section=section, opts=opts) as running:
        record = api.port_or_keep(
            patch, onto=onto, source=source, out=out, params=section, force=force, dry_run=dry_run,
            keep=hub is not None, on_progress=running.bytes, on_plan=planned.append,
        )  # fmt: skip
        running.cost.update(release=out.parent.name, task=record.task, trainable_parameters=0)
        running.finish(**({} if dry_run else of_port(record, out)))
    told, line = _of_port(record, out, running.bytes_done)
    if dry_run:
        told["plan"] = plans.as_json(planned[0])
        line = "\n".join(plans.lines(planned[0], record))
    elif hub is not None:
        pushed = api.push(hub, out, record)
        told["pushed"] = dataclasses.asdict(pushed)
        line = line if planned else f"{out}: is this very port already, whole and unchanged"
        line = f"{line}\n{pushed.url}: every file arrived (branch {pushed.revision}, commit {pushed.commit[:12]})"
    answer(told, as_json=opts.as_json, line=line)


def _of_port(record: PortRecord, out: Path, nbytes: int) -> tuple[dict[str, Any], str]:
    """What `port` answers: as JSON, and in a line for people."""
    matched, changed = record.modules["matched"], record.tensors["changed"]
    told = {
        "out": str(out), "as": record.output, "method": record.method, "scale": record.scale,
        "modules": record.modules, "tensors": record.tensors, "bytes": nbytes, **measured(),
        "base": {"fingerprint": record.base.fingerprint},
        "patch": {
            "fingerprint": record.patch.fingerprint,
            "trained_on": record.trained_on.fingerprint if record.trained_on else None,
        },
    }  # fmt: skip
    return told, f"{out}: {matched} of {record.modules['total']} modules, {changed} tensors changed"
