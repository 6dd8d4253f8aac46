"""The verbs of the command line as Python calls: directories or hub ids in, records out.

A call has the command's options as keyword arguments: `--dry-run` is `dry_run=`, and a name that is a keyword of Python
ends in an underscore (`from_=`, `as_=`). The options that every command derives from its section of params.yaml
(portllm.keywords) are keyword arguments, too. `params` is that section, all of them (`Params`), or a params.yaml; an
option takes precedence over it. Where a list is expected, one name is taken as a list of one.

Every call raises PortllmError (see portllm.errors) for a wrong input. Calls print nothing; notes that a command prints
go to the logger `portllm`. Nothing is recorded in MLflow, except what `register` is for.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from portllm import keywords
from portllm import params as sections
from portllm.checkpoint.record.records import DatasetRecord, PatchRecord, PortRecord, ReleaseRecord
from portllm.errors import ParamsError
from portllm.keywords import section_of, with_options, words
from portllm.lm.remote.hub import resolve
from portllm.lm.remote.publishing import Destination, Pushed
from portllm.params import Params, PortParams
from portllm.parsing import with_values
from portllm.verbs import port as port_verb

if TYPE_CHECKING:
    from portllm.checkpoint.planning.changes import Plan
    from portllm.lm.data.stock import Listed
    from portllm.tracking import Registered
    from portllm.verbs.doctor import Diagnosis
    from portllm.verbs.evaluate import Evaluation
    from portllm.verbs.register import RegisterRecord
    from portllm.verbs.report import CostRecord, ReportRecord
    from portllm.verbs.verify import VerifyRecord

Name = str | Path
Names = Name | Sequence[Name]

_LOG = logging.getLogger("portllm")


@dataclass(frozen=True)
class Registration:
    """What `register` decided (`record`), and the versions of accepted models in the MLflow registry (`versions`)."""

    record: RegisterRecord
    versions: tuple[Registered, ...]


def fetch(
    source: str | None = None,
    *,
    out: Name,
    corpus: Name | None = None,
    force: bool = False,
    params: Params | sections.FetchParams | Name | None = None,
    **options: Unpack[keywords.FetchOptions],
) -> ReleaseRecord:
    """Write the first release to `out`: a hub id, a directory, or `world` or `scratch`, pretrained on `corpus`.

    Raises PortllmError.
    """
    from portllm.verbs import fetch as verb

    _, section = section_of(params, "fetch", sections.FetchParams, options)
    section = with_values(section, {("source",): source}, where="fetch")
    return verb.run(
        corpus=_path(corpus), out=Path(out), params=section, force=force,
        training=_training(), download=_download(),
    )  # fmt: skip


def prepare(
    dataset: str,
    *,
    out: Name,
    force: bool = False,
    params: Params | sections.PrepareParams | Name | None = None,
    **options: Unpack[keywords.PrepareOptions],
) -> DatasetRecord:
    """Write a task's data, or a release's corpus (`corpus_RELEASE`), to `out` as parquet splits.

    Raises PortllmError.
    """
    from portllm.verbs import prepare as verb

    tree, section = section_of(params, "prepare", sections.PrepareParams, options)
    return verb.run(dataset=dataset, out=Path(out), params=section, text=verb.text_of(tree, dataset), force=force)


def evolve(
    *,
    base: Name,
    out: Name,
    corpus: Name | None = None,
    release: str | None = None,
    force: bool = False,
    params: Params | sections.EvolveParams | Name | None = None,
    **options: Unpack[keywords.EvolveOptions],
) -> ReleaseRecord:
    """Write the release after `base` to `out`: continued pretraining on `corpus`, or the source of recipe `release`.

    Raises PortllmError.
    """
    from portllm.checkpoint.files.output import refuse
    from portllm.verbs import evolve as verb

    _, section = section_of(params, "evolve", sections.EvolveParams, options)
    recipe = section.recipe(release)
    refuse(Path(out), force=force, inputs=())  # before gigabytes of `base` are downloaded
    return verb.run(
        base=resolve(base), corpus=_path(corpus), source=recipe.source if recipe else None, out=Path(out),
        params=section, force=force, training=_training(), download=_download(),
    )  # fmt: skip


def train(
    *,
    base: Name,
    task: str,
    out: Name,
    data: Name | None = None,
    force: bool = False,
    params: Params | sections.TrainParams | Name | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Unpack[keywords.TrainOptions],
) -> PatchRecord:
    """Train a LoRA patch of `base` on `task` and write it to `out`; one process, on the GPU where there is one.

    `data` has <task>/<split>.parquet; without it data/tasks, then data. Raises PortllmError.
    """
    from portllm.verbs import train as verb

    tree, section = section_of(params, "train", sections.TrainParams, {})
    section = with_options(section.for_task(task), options, "train")
    return verb.run(
        base=resolve(base), task=task, data=_path(data), out=Path(out), params=section, force=force,
        on_progress=on_progress, on_note=_note,
    )  # fmt: skip


def port(
    patch: Name,
    *,
    onto: Name,
    out: Name,
    from_: Name | None = None,
    force: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    revision: str | None = None,
    params: Params | PortParams | Name | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Unpack[keywords.PortOptions],
) -> PortRecord:
    """Put `patch` onto the release `onto` and write `out`; `from_` is the base it was trained on, where available.

    With `push_to_hub` (OWNER/NAME) the result is uploaded to that repository, `private` where requested, on the branch
    `revision`; an `out` that is the result of this very port is not written again. Raises PortllmError: a HubError
    once `out` is complete, which it then stays; any other, and nothing is written.
    """
    _, section = section_of(params, "port", PortParams, options)
    hub = None if push_to_hub is None else Destination(push_to_hub, private, revision)
    if hub is not None:
        hub.check()
    elif private or revision is not None:
        raise ParamsError("port: private and revision go with push_to_hub, found none; pass push_to_hub='OWNER/NAME'")
    record = port_or_keep(
        patch, onto=onto, out=out, source=from_, params=section, force=force, dry_run=dry_run,
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
    """Port without the hub; where `keep`, an `out` that is the unchanged result of this very port stays as it is."""
    patch, onto, source = resolve(patch), resolve(onto), None if source is None else resolve(source)
    if keep and not force and not dry_run:
        from portllm.checkpoint.verification.counterparts import made_before

        record = made_before(Path(out), patch=patch, onto=onto, source=source, params=params)
        if record is not None:
            return record
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
    from_: Name | None = None,
    all: bool = False,
    sample: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyRecord:
    """Prove that the ported `folder` is what its port.json states and, given base and patch, what these two make.

    `sample` changed tensors (8 by default), chosen by `seed`, are computed again from scratch, or `all`. Raises
    PortllmError, which names the first file or tensor that differs.
    """
    from portllm.checkpoint.verification.proof import TensorSample
    from portllm.verbs import verify as verify_verb

    if all and sample is not None:
        raise ParamsError("verify: all and sample exclude one another; pass one of them")
    return verify_verb.run(
        folder=resolve(folder, whole=True),
        onto=None if onto is None else resolve(onto),
        patch=None if patch is None else resolve(patch),
        source=None if from_ is None else resolve(from_),
        sample=TensorSample(count=8 if sample is None else sample, everything=all, seed=seed),
        on_progress=on_progress,
    )


def evaluate(
    model: Name,
    *,
    out: Name,
    tasks: str | Sequence[str] | None = None,
    patches: Names = (),
    own_task: bool = False,
    before: Names = (),
    data: Name | None = None,
    news: Name | None = None,
    samples: Name | None = None,
    cache: bool = True,
    trust_remote_code: bool = False,
    params: Params | sections.EvaluateParams | Name | None = None,
    **options: Unpack[keywords.EvaluateOptions],
) -> Evaluation:
    """Score `model`, and `patches` on it, on `tasks`; write `out` (JSON) and `samples` (parquet).

    `data` has <task>/<split>.parquet; without it data/tasks, then data, then the hub. `tasks` are those of `params` by
    default. With `own_task` a patch whose record names its task is scored on that and on what no patch is for.
    Results on the same content are taken from the user's cache, unless `cache` is False. Raises PortllmError.
    """
    from portllm.verbs import evaluate as verb

    tree, section = section_of(params, "evaluate", sections.EvaluateParams, options)
    return verb.run(
        model=resolve(model), tasks=words(tasks) if tasks is not None else tree.tasks, out=Path(out),
        patches=[resolve(path) for path in _list(patches)], own_task=own_task,
        before=[resolve(path) for path in _list(before)],
        data=_path(data), news=_path(news), samples=_path(samples), params=section,
        trust_remote_code=trust_remote_code, cache=cache, on_note=_note,
    )  # fmt: skip


def report(
    *,
    models: Name = Path("models"),
    results: Name = Path("results"),
    metrics: Name = Path("results/metrics.json"),
    plots: Name = Path("results/plots"),
    costs: bool = False,
    out: Name | None = None,
    force: bool = False,
    params: Params | sections.ReportParams | Name | None = None,
    **options: Unpack[keywords.ReportOptions],
) -> ReportRecord | CostRecord:
    """Write tables and plots of all arms to `out`, as Markdown and one HTML page; `params` has tasks and releases.

    With `costs`, write the page of what the stages cost on this machine instead. `out` is RESULTS/report by default, or
    RESULTS/cost/report. Raises PortllmError.
    """
    from portllm.verbs import report as verb

    tree, section = section_of(params, "report", sections.ReportParams, options)
    tree, results = dataclasses.replace(tree, report=section), Path(results)
    if costs:
        place = results / "cost"
        return verb.run_costs(params=tree, costs=place, out=Path(out or place / "report"), force=force or out is None)
    return verb.run(
        params=tree, models=Path(models), evaluated=results / "evaluate", out=Path(out or results / "report"),
        metrics=Path(metrics), plots=Path(plots), force=force, on_note=_note,
    )  # fmt: skip


def register(
    ported: Name,
    *,
    results: Name,
    out: Name | None = None,
    params: Params | sections.RegisterParams | Name | None = None,
    **options: Unpack[keywords.RegisterOptions],
) -> Registration:
    """Register the ported models that are better than their release's base arm in the MLflow model registry.

    `ported` is one model or a directory of them, `results` what `evaluate` wrote. The registry is that of
    MLFLOW_TRACKING_URI, else of mlflow.db in the working directory; the call is recorded there as a run, as the
    command's. Raises PortllmError, TrackingError where the registry refuses.
    """
    from portllm.lineage import of_register, version_requests
    from portllm.tracking import track
    from portllm.verbs import register as verb

    ported, results = Path(ported), Path(results)
    tree, section = section_of(params, "register", sections.RegisterParams, options)
    record = verb.run(
        ported=ported, results=results, params=section, tasks=tree.tasks, releases=tree.releases, out=_path(out),
        on_note=_note,
    )  # fmt: skip
    flat = sections.as_tree(section)
    with track("register", name=f"register {results.stem}", params=flat, root=Path(), warn=_note) as tracker:
        if record.accepted:
            tracker.register(version_requests(record, ported), decisions=_path(out))
        tracker.finish(**of_register(record, ported, _path(out)))
    return Registration(record, tracker.registered)


def fingerprint(path: Name) -> str:
    """Return one hex digest of the tensors of a checkpoint or patch. Raises PortllmError."""
    from portllm.verbs import fingerprint as verb

    return verb.run(path=resolve(path))


def tasks(*, all: bool = False) -> Sequence[Listed]:
    """Return the tasks that are known: the embedded world's and the paper's, or `all` of the harness's."""
    from portllm.verbs import tasks as verb

    return verb.run(everything=all)


def doctor(params: Params | Name | None = None, *, as_if: str | None = None) -> Diagnosis:
    """Return what the experiment in `params` needs and whether this machine, or one with the GPU `as_if`, has it.

    Raises PortllmError.
    """
    from portllm.verbs import doctor as verb

    tree = params if params is None or isinstance(params, Params) else sections.load(Path(params))
    return verb.run(params=tree, as_if=as_if)


def _list(names: Names) -> Sequence[Name]:
    return [names] if isinstance(names, (str, Path)) else names


def _path(name: Name | None) -> Path | None:
    return None if name is None else Path(name)


def _note(text: str) -> None:
    _LOG.warning("%s", text)


def _training() -> Any:
    from portllm.lm.learning.pretraining import TrainingCallbacks

    return TrainingCallbacks(on_note=_note)


def _download() -> Any:
    from portllm.lm.remote.releases import DownloadCallbacks

    return DownloadCallbacks(on_note=_note)
