"""evaluate: one model and many patches, scored with the LM Evaluation Harness over one loaded base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.checkpoint.fingerprint import fingerprint
from portllm.checkpoint.output import staged_file
from portllm.checkpoint.provenance import digests, public_name
from portllm.checkpoint.records import SCHEMA_VERSION, PatchRecord, PortRecord, dumps
from portllm.errors import EvaluationError, PatchError
from portllm.lm import evaluation, prompts
from portllm.params import EvaluateParams
from portllm.world import datasets

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is scored beside the bare model: an adapter to switch on, or a merged checkpoint to load."""

    path: Path
    fingerprint: str
    arm: str
    task: str | None
    merged: bool


# who is scored (None: the bare model) on which tasks
Plan = list[tuple[Candidate | None, list[str]]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One result: a task scored on one arm."""

    task: str
    patch: str | None
    arm: str
    patch_task: str | None
    patch_fingerprint: str | None
    metrics: Mapping[str, float]
    samples: tuple[evaluation.Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything one call scored; `as_json` is what OUT holds."""

    model: str
    fingerprint: str
    data: Mapping[str, str]
    cells: tuple[Cell, ...]

    def as_json(self) -> dict[str, Any]:
        """The contract's shape: model, and a row per task and patch."""
        results = [{**dataclasses.asdict(c), "samples": len(c.samples)} for c in self.cells]
        return {
            "schema_version": SCHEMA_VERSION,
            "release": Path(self.model).name,
            "data": self.data,
            "model": {"name": self.model, "fingerprint": self.fingerprint},
            "results": results,
        }

    def lines(self) -> list[str]:
        """A line per result, for people."""
        rows = [(c, evaluation.main_metric(c.metrics)) for c in self.cells]
        return [f"{c.task:24} {c.patch or c.arm:40} {key}={c.metrics[key]:.4f}" for c, key in rows]


def run(
    *,
    model: Path,
    tasks: Sequence[str],
    out: Path,
    params: EvaluateParams,
    patches: Sequence[Path] = (),
    before: Sequence[Path] = (),
    data: Path = Path("data"),
    news: Path | None = None,
    samples: Path | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Score `model`, and every patch over it, on `tasks`; write OUT (JSON) and each example's answer (parquet).

    `data` holds DATA/<task>/<split>.parquet of the embedded world's tasks; `news` is a release's corpus,
    whose facts and held-out text become two more tasks. A patch is scored on its own task and on the
    tasks no patch is for; `before` names models of an earlier release, asked only what no patch is for.
    Raises EvaluationError and PatchError.
    """
    mark = fingerprint(model)
    asked = [_candidate(p, mark) for p in _expand(patches)]
    known = {c.path.resolve() for c in asked}
    old = [_candidate(p, mark) for p in _expand(before) if p.resolve() not in known]
    specs = {t: _spec(t, data) for t in tasks} | _news(news)
    plan = _plan(list(specs), [*asked, *(dataclasses.replace(c, arm="old") for c in old)])
    loaded = evaluation.load_tasks(list(specs.values()), params)
    cells: list[Cell] = []
    total = sum(len(names) for _, names in plan)
    for cell in _score(model, plan, loaded, params, trust_remote_code):
        cells.append(cell)
        if on_progress:
            on_progress(len(cells), total, f"{cell.arm} {cell.task}")
    files = [_asked(spec) for spec in specs.values() if isinstance(spec, Mapping)]
    result = Evaluation(model=public_name(model), fingerprint=mark, data=digests(files), cells=tuple(cells))
    with staged_file(out) as path:
        path.write_text(dumps(result.as_json()), encoding="utf-8")
    if samples is not None:
        with staged_file(samples) as path:
            _write_samples(path, result.cells)
    return result


def _spec(task: str, data: Path) -> str | dict[str, Any]:
    """A task of the embedded world on its files in `data`; any other name is the harness's own."""
    if task not in datasets.TASKS:
        return task
    config = prompts.load_task(datasets.task_file(task))
    files = {split: data / task / f"{split}.parquet" for split in datasets.SPLITS}
    return evaluation.on_files(config, files, name=task)


def _news(corpus: Path | None) -> dict[str, str | dict[str, Any]]:
    """What a release's corpus is asked about: does the model know its facts, and is it surprised by its text?"""
    if corpus is None:
        return {}
    tasks: dict[str, str | dict[str, Any]] = {}
    for kind, split in (("recall", "recall"), ("perplexity", "test")):
        name = f"corpus_{corpus.name}_{kind}"
        config = prompts.load_task(datasets.task_file(f"world_{kind}"))
        tasks[name] = evaluation.on_files(config, {split: corpus / f"{split}.parquet"}, name=name)
    return tasks


def _asked(spec: Mapping[str, Any]) -> Path:
    """The file whose rows the harness asks; the other splits are there for few-shot examples only."""
    return Path(spec["dataset_kwargs"]["data_files"][spec["test_split"]])


def _score(
    model: Path, plan: Plan, tasks: Mapping[str, Any], params: EvaluateParams, trust_remote_code: bool
) -> Iterator[Cell]:
    base, tokenizer = evaluation.load_model(model, trust_remote_code=trust_remote_code)
    bench = evaluation.Harness(base, tokenizer, tasks, params)
    for candidate, names in plan:
        if candidate is None:
            yield from _cells(None, bench.score(names))
        elif candidate.merged:
            other, words = evaluation.load_model(candidate.path, trust_remote_code=trust_remote_code)
            yield from _cells(candidate, evaluation.Harness(other, words, tasks, params).score(names))
        else:
            with evaluation.adapted(base, candidate.path) as patched:
                yield from _cells(candidate, bench.score(names, model=patched))


def _cells(candidate: Candidate | None, scored: Sequence[evaluation.Scored]) -> Iterator[Cell]:
    for one in scored:
        yield Cell(
            task=one.task,
            patch=public_name(candidate.path) if candidate else None,
            arm=candidate.arm if candidate else "base",
            patch_task=candidate.task if candidate else None,
            patch_fingerprint=candidate.fingerprint if candidate else None,
            metrics=one.metrics,
            samples=one.samples,
        )


def _plan(tasks: Sequence[str], candidates: Sequence[Candidate]) -> Plan:
    if not tasks:
        raise EvaluationError("no task to evaluate on; name at least one with --tasks (see `portllm tasks`)")
    owned = {c.task for c in candidates}
    plan: Plan = [(None, list(tasks))]
    for c in candidates:
        own = c.arm != "old"
        names = [t for t in tasks if t not in owned or (own and t == c.task)]
        if names:
            plan.append((c, names))
    return plan


def _expand(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if _is_adapter(path) or _is_checkpoint(path):
            yield path
            continue
        inside = sorted(p for p in path.iterdir() if _is_adapter(p) or _is_checkpoint(p)) if path.is_dir() else []
        if not inside:
            raise PatchError(
                f"{path}: expected a patch (adapter_config.json), a ported checkpoint (config.json) "
                "or a directory of them, found neither"
            )
        yield from inside


def _candidate(path: Path, base_mark: str) -> Candidate:
    arm, task = _told(path, base_mark)
    return Candidate(path=path, fingerprint=fingerprint(path), arm=arm, task=task, merged=not _is_adapter(path))


def _told(path: Path, base_mark: str) -> tuple[str, str | None]:
    """The arm and task a directory's own record tells; what is not known is not guessed."""
    if (path / PortRecord.FILE).is_file():
        return "ported", PortRecord.read(path).task
    if not _is_adapter(path):
        return "model", None
    if not (path / PatchRecord.FILE).is_file():
        return "patched", None
    record = PatchRecord.read(path)
    return "tuned" if record.base.fingerprint == base_mark else "ported", record.task


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _is_checkpoint(path: Path) -> bool:
    return (path / "config.json").is_file()


def _write_samples(path: Path, cells: Sequence[Cell]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"task": c.task, "arm": c.arm, "patch_task": c.patch_task, **_sample(s)} for c in cells for s in c.samples]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


def _sample(sample: evaluation.Sample) -> dict[str, Any]:
    return {
        "doc_id": sample.doc_id,
        "correct": sample.score == 1.0,
        "score": sample.score,
        "answer": sample.answer,
        "target": sample.target,
    }
