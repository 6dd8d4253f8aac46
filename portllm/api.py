"""The verbs as Python calls: paths or hub ids in, records out; what `import portllm` offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from portllm.checkpoint.record.records import PortRecord
from portllm.lm.remote.hub import resolve
from portllm.lm.remote.publishing import Destination, Pushed
from portllm.params import EvaluateParams, PortParams
from portllm.verbs import port as port_verb

if TYPE_CHECKING:
    from portllm.checkpoint.planning.changes import Plan
    from portllm.verbs.evaluate import Evaluation
    from portllm.verbs.verify import VerifyRecord

Name = str | Path


def port(
    patch: Name,
    *,
    onto: Name,
    out: Name,
    source: Name | None = None,
    as_: Literal["merged", "adapter"] = "merged",
    scale: float = 1.0,
    force: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    revision: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PortRecord:
    """Put `patch` onto the release `onto` and write `out`; `source` is the base it was trained on, if at hand.

    With `push_to_hub` (OWNER/NAME) what was written is uploaded to that repository, `private` where asked, on the
    branch `revision`; an `out` that this very port has written before is not written again. Raises PortllmError (see
    portllm.errors): a HubError once `out` is complete, which it then stays; any other, and nothing is written.
    """
    hub = None if push_to_hub is None else Destination(push_to_hub, private, revision)
    if hub is not None:
        hub.check()
    params = PortParams(as_=as_, scale=scale)
    record = port_or_keep(
        patch, onto=onto, out=out, source=source, params=params, force=force, dry_run=dry_run,
        keep=hub is not None, on_progress=on_progress, on_plan=None,
    )  # fmt: skip
    if hub is not None and not dry_run:
        push(hub, Path(out), record)
    return record


def port_or_keep(
    patch: Name,
    *,
    onto: Name,
    out: Name,
    source: Name | None,
    params: PortParams,
    force: bool,
    dry_run: bool,
    keep: bool,
    on_progress: Callable[[int, int], None] | None,
    on_plan: Callable[[Plan], None] | None,
) -> PortRecord:
    """`port` without the hub; where `keep`, an `out` that is this very port already, unchanged, is left as it is."""
    patch, onto, source = resolve(patch), resolve(onto), None if source is None else resolve(source)
    if keep and not force and not dry_run:
        from portllm.checkpoint.verification.counterparts import made_before

        made = made_before(Path(out), patch=patch, onto=onto, source=source, params=params)
        if made is not None:
            return made
    return port_verb.run(
        patch=patch,
        onto=onto,
        out=Path(out),
        params=params,
        source=source,
        force=force,
        dry_run=dry_run,
        on_progress=on_progress,
        on_plan=on_plan,
    )


def push(hub: Destination, out: Path, record: PortRecord) -> Pushed:
    """Upload every file that port.json names, and port.json. Raises HubError; `out` stays as it is."""
    return hub.push(out, [*record.files, PortRecord.FILE])


def verify(
    folder: Name,
    *,
    onto: Name | None = None,
    patch: Name | None = None,
    source: Name | None = None,
    sample: int | None = 8,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyRecord:
    """Prove that the ported `folder` is what its port.json says and, given base and patch, what these two make.

    `sample` changed tensors, chosen by `seed`, are computed again from scratch; None: all. Raises PortllmError, which
    names the first file or tensor that differs.
    """
    from portllm.checkpoint.verification.proof import Sample
    from portllm.verbs import verify as verify_verb

    return verify_verb.run(
        folder=resolve(folder, whole=True),
        onto=None if onto is None else resolve(onto),
        patch=None if patch is None else resolve(patch),
        source=None if source is None else resolve(source),
        sample=Sample(count=8 if sample is None else sample, everything=sample is None, seed=seed),
        on_progress=on_progress,
    )


def evaluate(
    model: Name,
    *,
    tasks: Sequence[str],
    out: Name,
    patches: Sequence[Name] = (),
    data: Name | None = None,
    params: EvaluateParams | None = None,
    cache: bool = True,
) -> Evaluation:
    """Score `model` and `patches` over it on `tasks`, whose files `data` holds (data/ by default); write `out` (JSON).

    What was scored before on the same content is taken from the user's cache, unless `cache` is False. Raises
    PortllmError.
    """
    from portllm.verbs import evaluate as evaluate_verb

    return evaluate_verb.run(
        model=resolve(model),
        tasks=tasks,
        out=Path(out),
        patches=[resolve(p) for p in patches],
        data=None if data is None else Path(data),
        params=params or EvaluateParams(),
        cache=cache,
    )


def fingerprint(path: Name) -> str:
    """One hex digest of the tensors of a checkpoint or patch. Raises PortllmError."""
    from portllm.verbs import fingerprint as fingerprint_verb

    return fingerprint_verb.run(path=resolve(path))
