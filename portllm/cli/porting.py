"""port: a patch onto another release, and the plan that --dry-run prints."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from portllm import params
from portllm.cli.options import FORCE, OUT, apply, common, of_section
from portllm.cli.running import Common, answer, measured, place, stage

if TYPE_CHECKING:
    from portllm.checkpoint.planning.changes import Plan
    from portllm.checkpoint.record.records import PortRecord

LISTED = 6  # a line names at most so many tensors of the patch, and counts them where there are more


@click.command(short_help="Put a patch onto another release, without training.")
@click.argument("patch")
@click.option(
    "--onto", required=True, metavar="BASE", help="The release to port onto: a directory or hub-id[@revision]."
)
@click.option("--from", "source", metavar="OLD", help="The base the patch was trained on; its identity is checked.")
@click.option("--dry-run", is_flag=True, help="Check everything, print each tensor's change, write nothing.")
@click.option("--push-to-hub", metavar="REPO", help="Upload the complete OUT to this model repository (OWNER/NAME).")
@click.option("--private", is_flag=True, help="Make the repository private.")
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

    Pushing uses the token of `hf auth login` or HF_TOKEN. When a push fails, OUT stays: the same command pushes
    it again without porting.

    \b
    Examples:
      portllm port my-patch --onto mistralai/Mistral-7B-v0.3 --out ported
      portllm port my-patch --onto new-base --out retargeted --as adapter
      portllm port my-patch --onto new-base --from old-base --out ported --json
      portllm port my-patch --onto new-base --out ported --dry-run
      portllm port my-patch --onto new-base --out ported --push-to-hub me/my-model --private
    """
    from portllm import api
    from portllm.lineage import of_port
    from portllm.lm.remote.publishing import Destination

    if push_to_hub is None and (private or revision is not None):
        raise click.UsageError("--private and --revision go with --push-to-hub.")
    hub = Destination(push_to_hub, private, revision) if push_to_hub is not None else None
    if hub is not None:
        hub.check()
    plans: list[Plan] = []
    section = apply(params.load(opts.params_file).port, flags, where="port")
    name = f"port {place(out)}"
    with stage("port", name=name, section=section, opts=opts) as running:
        record = api.port_or_keep(
            patch, onto=onto, source=source, out=out, params=section, force=force, dry_run=dry_run,
            keep=hub is not None, on_progress=running.bytes, on_plan=plans.append,
        )  # fmt: skip
        running.cost.update(release=out.parent.name, task=record.task, trainable_parameters=0)
        running.finish(**({} if dry_run else of_port(record, out)))
    result, line = _of_port(record, out, running.bytes_done)
    if dry_run:
        result["plan"] = plan_as_json(plans[0])
        line = "\n".join(plan_lines(plans[0], record))
    elif hub is not None:
        pushed = api.push(hub, out, record)
        result["pushed"] = dataclasses.asdict(pushed)
        line = line if plans else f"{out}: is the result of this very port, complete and unchanged"
        line = f"{line}\n{pushed.url}: all files uploaded (branch {pushed.revision}, commit {pushed.commit[:12]})"
    answer(result, as_json=opts.as_json, line=line)


def _of_port(record: PortRecord, out: Path, nbytes: int) -> tuple[dict[str, Any], str]:
    """Return the answer of `port`: as JSON, and in a line for people."""
    matched, changed = record.modules["matched"], record.tensors["changed"]
    result = {
        "out": str(out), "as": record.output, "method": record.method, "scale": record.scale,
        "modules": record.modules, "tensors": record.tensors, "bytes": nbytes, **measured(),
        "base": {"fingerprint": record.base.fingerprint},
        "patch": {
            "fingerprint": record.patch.fingerprint,
            "trained_on": record.trained_on.fingerprint if record.trained_on else None,
        },
    }  # fmt: skip
    return result, f"{out}: {matched} of {record.modules['total']} modules, {changed} tensors changed"


# --- the plan of a dry run ---


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as `port --dry-run --json` has it."""
    return {"changes": [{**row, "from": list(row["from"])} for row in plan.rows()], "config": dict(plan.config)}


def plan_lines(plan: Plan, record: PortRecord) -> Iterator[str]:
    """Yield the plan in lines: tensor, dtype, shape, change, source tensors of the patch; then the totals."""
    rows = list(plan.rows())
    widths = {key: max((len(_plain(row[key])) for row in rows), default=0) for key in ("tensor", "dtype", "shape")}
    for row in rows:
        start = "  ".join(_plain(row[key]).ljust(width) for key, width in widths.items())
        yield f"{start}  {_plain(row['change'])}" + (f"  from {folded(row['from'])}" if row["from"] else "")
    for key, value in sorted(plan.config.items()):
        yield f"config.json: {_plain(key)} = {_plain(json.dumps(value, ensure_ascii=False))}"
    kinds = Counter(_plain(row["change"]) for row in rows)
    totals = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
    copied = _copies(record)
    yield (
        f"dry run: {len(rows)} tensors would change ({totals or 'none'}), {copied}; "
        f"{record.modules['matched']} of {record.modules['total']} modules; nothing was written"
    )


def _copies(record: PortRecord) -> str:
    """Return what would be copied, in words: as an adapter the patch itself, whatever a merge would change."""
    if record.output == "adapter":
        return "as an adapter they stay in the patch, which is copied"
    return f"{record.tensors.get('copied', 0)} would be copied"


def folded(names: Sequence[str]) -> str:
    """Return the names of a few tensors in short: `a.lora_{A,B}.weight` for `a.lora_A.weight`, `a.lora_B.weight`."""
    names = [_plain(name) for name in names]
    if len(names) == 1:
        return names[0]
    if len(names) > LISTED:
        return f"{names[0]} … {names[-1]} ({len(names)} tensors)"
    head = os.path.commonprefix(names)
    rest = [name[len(head) :] for name in names]
    tail = os.path.commonprefix([name[::-1] for name in rest])[::-1]
    return f"{head}{{{','.join(name[: len(name) - len(tail)] for name in rest)}}}{tail}"


def _plain(text: str) -> str:
    # names come from files: none may move the cursor or break the line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
