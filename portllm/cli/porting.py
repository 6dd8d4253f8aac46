"""port: a patch onto another release."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from portllm import params
from portllm.cli.options import FORCE, OUT, apply, common, of_section
from portllm.cli.running import Common, answer, measured, place, stage

if TYPE_CHECKING:
    from portllm.checkpoint.planning.changes import Plan
    from portllm.checkpoint.record.records import PortRecord


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
    from portllm.lineage import of_port
    from portllm.lm.remote.publishing import Destination

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
