"""verify, report, register, fingerprint: proofs, tables, the model registry, identity."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from portllm import params
from portllm.cli.options import DIRECTORY, FORCE, JSON, apply, common, of_section
from portllm.cli.running import Common, answer, measured, stage

if TYPE_CHECKING:
    from portllm.tracking import Registered


@click.command(short_help="Prove a ported directory.")
@click.argument("folder", metavar="DIR")
@click.option("--onto", metavar="BASE", help="The release of the port: compare every tensor.")
@click.option("--patch", metavar="PATCH", help="The patch it was made from; goes with --onto.")
@click.option("--from", "source", metavar="OLD", help="The base the patch was trained on, where the port needed it.")
@click.option("--all", "everything", is_flag=True, help="Compute every changed tensor again, not a sample.")
@click.option("--sample", type=click.IntRange(min=1), help="How many changed tensors to compute again [default: 8].")
@click.option("--seed", type=int, default=0, show_default=True, help="Which tensors the sample takes.")
@JSON
def verify(
    folder: str,
    onto: str | None,
    patch: str | None,
    source: str | None,
    everything: bool,
    sample: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Prove that a ported directory is what its port.json states, and what its base and patch give.

    Every file is read again and compared with port.json. With base and patch, every unchanged tensor must equal the
    base's byte for byte, and a sample of the changed tensors is computed again in float64 and rounded once.

    \b
    Examples:
      portllm verify ported
      portllm verify ported --onto new-base --patch my-patch
      portllm verify ported --onto new-base --patch my-patch --all --json
      portllm verify me/my-ported-model --onto mistralai/Mistral-7B-v0.3 --patch me/my-patch
    """
    from portllm import api
    from portllm.lineage import of_verify

    if (onto is None) != (patch is None) or (source is not None and onto is None):
        raise click.UsageError("--onto and --patch go together, and --from goes with them.")
    if onto is None and (everything or sample is not None):
        raise click.UsageError("--all and --sample need --onto and --patch.")
    if everything and sample is not None:
        raise click.UsageError("--all and --sample exclude one another.")
    opts = Common(params_file=None, cost=None, as_json=as_json)
    with stage("verify", name=f"verify {Path(folder).name}", section=None, opts=opts) as running:
        record = api.verify(
            folder, onto=onto, patch=patch, from_=source, all=everything, sample=sample, seed=seed,
            on_progress=running.bytes,
        )  # fmt: skip
        running.finish(**of_verify(record))
    answer({**record.as_json(), **measured()}, as_json=as_json, line="\n".join(record.lines()))


@click.command(short_help="Tables and plots of all arms.")
@click.option(
    "--models", type=DIRECTORY, default=Path("models"), show_default=True, help="releases/, patches/ and ported/."
)
@click.option("--results", type=DIRECTORY, default=Path("results"), show_default=True, help="evaluate/, or cost/.")
@click.option(
    "--metrics", type=DIRECTORY, default=Path("results/metrics.json"), show_default=True, help="JSON to write."
)
@click.option(
    "--plots", type=DIRECTORY, default=Path("results/plots"), show_default=True, help="CSV directory to write."
)
@click.option(
    "--costs", is_flag=True, help="Report seconds and memory of the stages on this machine instead (RESULTS/cost)."
)
@click.option(
    "--out",
    type=DIRECTORY,
    help="Directory to write; it appears complete or not at all [default: RESULTS/report, or RESULTS/cost/report].",
)
@FORCE
@of_section("report", params.ReportParams)
@common
def report(
    models: Path,
    results: Path,
    metrics: Path,
    plots: Path,
    costs: bool,
    out: Path | None,
    force: bool,
    opts: Common,
    **flags: Any,
) -> None:
    """Write tables and plots of all arms, as Markdown and one self-contained HTML page.

    What the stages cost differs from run to run, so it has a page of its own: --costs.

    \b
    Examples:
      portllm report --params params.yaml --out results/report --force
      portllm report --costs
    """
    from portllm.lineage import of_report
    from portllm.verbs import report as verb

    if costs:
        _report_costs(results, out, force, opts)
        return
    out = out or results / "report"
    tree = params.load(opts.params_file)
    tree = dataclasses.replace(tree, report=apply(tree.report, flags, where="report"))
    with stage("report", name="report", section=tree.report, opts=opts) as running:
        record = verb.run(
            params=tree, models=models, evaluated=results / "evaluate", out=out, metrics=metrics, plots=plots,
            force=force, on_note=running.note,
        )  # fmt: skip
        running.finish(**of_report(record, out, metrics))
    answer(dataclasses.asdict(record), as_json=opts.as_json, line=f"{record.headline}\n{out / 'report.html'}")


def _report_costs(results: Path, out: Path | None, force: bool, opts: Common) -> None:
    """Write the page of costs; in its default place it replaces the page of an earlier call."""
    from portllm.verbs import report as verb

    context = click.get_current_context()
    for name in ("models", "metrics", "plots"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--costs reads and writes no {name}; leave out --{name}.")
    record = verb.run_costs(
        params=params.load(opts.params_file or Path("params.yaml")), costs=results / "cost",
        out=out or results / "cost" / "report", force=force or out is None,
    )  # fmt: skip
    page = Path(record.out) / "report.html"
    answer(dataclasses.asdict(record), as_json=opts.as_json, line=f"{record.headline}\n{page}")


@click.command(short_help="Register ported models in MLflow.")
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
    from portllm.lineage import of_register, version_requests
    from portllm.verbs import register as verb

    tree = params.load(opts.params_file)
    section = apply(tree.register, flags, where="register")
    notes: list[str] = []
    record = verb.run(
        ported=ported, results=results, params=section, tasks=tree.tasks, releases=tree.releases, out=out,
        on_note=notes.append,
    )  # fmt: skip
    # a wrong input ends before the stage, which creates mlflow.db
    with stage("register", name=f"register {results.stem}", section=section, opts=opts, always=True) as running:
        for note in notes:
            running.note(note)
        if record.accepted:
            running.tracker.register(version_requests(record, ported), decisions=out)
        running.finish(**of_register(record, ported, out))
    versions = {version.name: version for version in running.tracker.registered}
    lines = [f"{d.name}: {_registration(versions.get(d.name))} ({d.reason})" for d in record.decisions]
    result = {**dataclasses.asdict(record), "registered": [dataclasses.asdict(v) for v in versions.values()]}
    answer(result, as_json=opts.as_json, line="\n".join(lines) or "nothing to register")


def _registration(version: Registered | None) -> str:
    if version is None:
        return "not registered"
    state = "" if version.created else " already"
    aliases = f", {', '.join(version.aliases)}" if version.aliases else ""
    note = f"; {version.note}" if version.note else ""
    return f"version {version.version}{state}{aliases}{note}"


@click.command(short_help="The identity of a checkpoint's or patch's tensors.")
@click.argument("path")
@JSON
def fingerprint(path: str, as_json: bool) -> None:
    """Print one hex digest of a checkpoint's or patch's tensors, independent of their shards and order.

    \b
    Example:
      portllm fingerprint mistralai/Mistral-7B-v0.1
    """
    from portllm.lm.remote.hub import resolve
    from portllm.verbs import fingerprint as verb

    digest = verb.run(path=resolve(path))
    answer({"path": path, "fingerprint": digest}, as_json=as_json, line=digest)
