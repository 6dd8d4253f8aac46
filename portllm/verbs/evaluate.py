"""evaluate: one model and many patches, scored with the LM Evaluation Harness over one loaded base."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm import processes
from portllm.checkpoint.adapter.classification import expect_names_of_a_file
from portllm.checkpoint.adapter.patch import WEIGHTS
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.files.headers import read_header
from portllm.checkpoint.files.output import refuse_file, staged_file
from portllm.checkpoint.record.provenance import digests, public_name
from portllm.checkpoint.record.records import SCHEMA_VERSION, PatchRecord, PortRecord, dumps
from portllm.errors import PatchError
from portllm.lm.scoring import evaluation, identity, ledger, sharing
from portllm.lm.scoring.questions import Questions
from portllm.lm.scoring.scored import Sample, Scored, main_metric
from portllm.params import EvaluateParams

Progress = Callable[[int, int, str], None]  # documents scored, of how many, what is being scored


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is scored beside the bare model: an adapter to switch on, or a merged checkpoint to load."""

    path: Path
    fingerprint: str
    arm: str
    task: str | None
    merged: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """A task to be scored on a candidate; None: on the bare model."""

    candidate: Candidate | None
    task: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One result: a task scored on one arm."""

    task: str
    patch: str | None
    arm: str
    patch_task: str | None
    patch_fingerprint: str | None
    metrics: Mapping[str, float]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything one call scored, or knew (`known` of the cells); `as_json` is what OUT holds."""

    model: str
    fingerprint: str
    data: Mapping[str, str]
    cells: tuple[Cell, ...]
    known: int = 0

    def as_json(self) -> dict[str, Any]:
        """The contract's shape: model, and a row per task and patch."""
        results = [{**vars(c), "samples": len(c.samples)} for c in self.cells]
        return {
            "schema_version": SCHEMA_VERSION,
            "release": Path(self.model).name,
            "data": self.data,
            "model": {"name": self.model, "fingerprint": self.fingerprint},
            "results": results,
        }

    def lines(self) -> list[str]:
        """A line per result, for people."""
        rows = [(c, main_metric(c.metrics)) for c in self.cells]
        return [f"{c.task:24} {c.patch or c.arm:40} {key}={c.metrics[key]:.4f}" for c, key in rows]


def run(
    *,
    model: Path,
    tasks: Sequence[str],
    out: Path,
    params: EvaluateParams,
    patches: Sequence[Path] = (),
    before: Sequence[Path] = (),
    data: Path | None = None,
    news: Path | None = None,
    samples: Path | None = None,
    trust_remote_code: bool = False,
    cache: bool = True,
    on_progress: Progress | None = None,
    on_note: Callable[[str], object] = lambda _: None,
) -> Evaluation:
    """Score `model`, and every patch over it, on `tasks`; write OUT (JSON) and each example's answer (parquet).

    `data` holds DATA/<task>/<split>.parquet; `news` is a release's corpus, whose facts and held-out text become two
    more tasks where they are there. A patch is scored on its own task and on the tasks no patch is for; `before` names
    models of an earlier release, asked only what no patch is for. What was scored before on the very same content is
    taken from the user's cache, unless `cache` is False. Raises PortllmError.
    """
    for path in (out, samples):
        if path is not None:
            refuse_file(path)  # before hours of scoring
    mark = fingerprint(model)
    asked = [_candidate(p, mark) for p in _expand(patches)]
    known = {c.path.resolve() for c in asked}
    old = [_candidate(p, mark) for p in _expand(before) if p.resolve() not in known]
    questions = Questions(tasks, data=data, news=news)
    for name in questions.of_the_hub():
        on_note(f"{name}: asked from the hub, not pinned; `portllm prepare {name}` pins it")
    plan = _plan(questions.names, [*asked, *(dataclasses.replace(c, arm="old") for c in old)])
    scoring = Scoring(model, questions, params, trust_remote_code=trust_remote_code, on_progress=on_progress)
    scored, found = _scored(plan, scoring, cache=cache)
    result = Evaluation(
        model=public_name(model),
        fingerprint=mark,
        data=digests(dict.fromkeys(questions.files(scored))),
        cells=tuple(_cell(row.candidate, one) for row, one in zip(plan, scored, strict=True)),
        known=found,
    )
    with staged_file(out) as path:
        path.write_text(dumps(result.as_json()), encoding="utf-8")
    if samples is not None:
        with staged_file(samples) as path:
            _write_samples(path, result.cells)
    return result


def _scored(plan: Sequence[Row], scoring: Scoring, *, cache: bool) -> tuple[list[Scored], int]:
    """What each row of the plan scored, and how many of them were known."""
    keys = [scoring.key(row) for row in plan] if cache and processes.is_main() else [None] * len(plan)
    scored = {i: found for i, key in enumerate(keys) if key is not None and (found := ledger.find(key))}
    scored = sharing.from_main(scored)  # on another machine the cache is another one
    known = len(scored)
    for i, one in scoring.score({i: row for i, row in enumerate(plan) if i not in scored}):
        scored[i] = one
        if (key := keys[i]) is not None and scoring.unchanged(plan[i]):
            ledger.keep(key, one)
    return [scored[i] for i in range(len(plan))], known


class Scoring:
    """Scores rows of a plan: what is put on the model over one loaded base, merged checkpoints one after another."""

    def __init__(
        self,
        model: Path,
        questions: Questions,
        params: EvaluateParams,
        *,
        trust_remote_code: bool,
        on_progress: Progress | None,
    ) -> None:
        self._model, self._questions, self._params = model, questions, params
        self._trust, self._on_progress = trust_remote_code, on_progress
        self._weights: dict[Path, Mapping[str, Any]] = {}
        self._tasks: dict[str, Mapping[str, Any] | None] = {}
        self._states: dict[Path, Mapping[str, list[int]]] = {}
        self._sizes: dict[str, int] = {}
        self._rows: Mapping[int, Row] = {}
        self._done = self._total = 0

    def key(self, row: Row) -> dict[str, Any] | None:
        """All that the row's figures depend on; None where not all of it is at hand."""
        for folder in self._folders(row):
            self._states.setdefault(folder, identity.state(folder))
        if row.task not in self._tasks:
            self._tasks[row.task] = self._questions.key(row.task)
        asked = self._tasks[row.task]
        if asked is None:
            return None
        checkpoint, *patch = [self._of_weights(path) for path in self._loaded(row)]
        # batches, threads and processes decide how, not what
        told = {name: vars(self._params)[name] for name in ("seed", "num_fewshot", "limit")}
        return {
            "task": row.task,
            **asked,
            "model": checkpoint,
            "patch": patch[0] if patch else None,
            "params": {**told, "trust_remote_code": self._trust, "dtype": "auto"},
            "code": dict(identity.of_code()),
            "device": identity.of_device(),
        }

    def unchanged(self, row: Row) -> bool:
        """Whether the files that `key` looked at are still what they were then."""
        return all(identity.state(folder) == self._states[folder] for folder in self._folders(row))

    def score(self, rows: Mapping[int, Row]) -> Iterator[tuple[int, Scored]]:
        """Every row's score under its number; those over the base first."""
        self._rows = rows
        over_base = {i: row for i, row in rows.items() if len(self._loaded(row)) > 1 or row.candidate is None}
        if over_base:
            yield from self._on(self._model, over_base)
        merged = [row.candidate.path for i, row in rows.items() if i not in over_base and row.candidate]
        for path in dict.fromkeys(merged):
            yield from self._on(path, {i: r for i, r in rows.items() if r.candidate and self._loaded(r) == [path]})

    def _on(self, checkpoint: Path, rows: Mapping[int, Row]) -> Iterator[tuple[int, Scored]]:
        """Scores of a checkpoint and of the patches put on it; it is let go before the next is loaded."""
        gc.collect()  # the harness and its model refer to each other: the one before is still whole in memory
        harness = evaluation.Harness(checkpoint, self._params, trust_remote_code=self._trust)
        names = list(dict.fromkeys(row.task for row in rows.values()))
        tasks = self._questions.load(names, identity.of_words(checkpoint), harness.tokenizer, self._params)
        self._sizes |= {name: evaluation.documents(task, self._params) for name, task in tasks.items()}
        self._total = sum(self._sizes.get(row.task, 0) for row in self._rows.values())
        if self._on_progress and not self._done:
            self._on_progress(0, self._total, "")
        for candidate in dict.fromkeys(row.candidate for row in rows.values()):
            patched = harness.patched(candidate.path) if candidate and not candidate.merged else nullcontext()
            with patched:
                for i, row in rows.items():
                    if row.candidate == candidate:
                        yield i, self._ask(harness, row, tasks[row.task])

    def _ask(self, harness: evaluation.Harness, row: Row, task: Any) -> Scored:
        what = f"{row.candidate.arm if row.candidate else 'base'} {row.task}"

        size = self._sizes[row.task]

        def told(share: float) -> None:
            if self._on_progress:
                self._on_progress(self._done + int(share * size), self._total, what)

        scored = harness.score(task, on_answered=told)
        self._done += size
        return scored

    def _loaded(self, row: Row) -> list[Path]:
        """The checkpoint a row is scored on, and what is put on it."""
        if row.candidate is None:
            return [self._model]
        return [row.candidate.path] if row.candidate.merged else [self._model, row.candidate.path]

    def _folders(self, row: Row) -> list[Path]:
        return [*self._loaded(row), self._questions.folder(row.task)]

    def _of_weights(self, path: Path) -> Mapping[str, Any]:
        if path not in self._weights:
            self._weights[path] = identity.of_weights(path)
        return self._weights[path]


def _plan(tasks: Sequence[str], candidates: Sequence[Candidate]) -> list[Row]:
    owned = {c.task for c in candidates}
    plan = [Row(candidate=None, task=task) for task in tasks]
    for c in candidates:
        own = c.arm != "old"
        plan += [Row(candidate=c, task=t) for t in tasks if t not in owned or (own and t == c.task)]
    return plan


def _cell(candidate: Candidate | None, scored: Scored) -> Cell:
    return Cell(
        task=scored.task,
        patch=public_name(candidate.path) if candidate else None,
        arm=candidate.arm if candidate else "base",
        patch_task=candidate.task if candidate else None,
        patch_fingerprint=candidate.fingerprint if candidate else None,
        metrics=scored.metrics,
        samples=scored.samples,
    )


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
    if (path / WEIGHTS).is_file():  # PEFT would pass such tensors over, and the base be scored as the patch
        expect_names_of_a_file(read_header(path / WEIGHTS))
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
    """A row per document and cell; the maps hold every filter's metrics and answers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    columns = {"task": text, "arm": text, "patch_task": text, "doc_id": pa.int64(), "correct": pa.bool_()}
    columns |= {"score": number, "answer": text, "target": text, "metrics": pa.map_(text, number)}
    schema = pa.schema(columns | {"answers": pa.map_(text, text), "loglikelihoods": pa.list_(number), "written": text})
    rows = [{"task": c.task, "arm": c.arm, "patch_task": c.patch_task, **_sample(s)} for c in cells for s in c.samples]
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")


def _sample(sample: Sample) -> dict[str, Any]:
    maps = {name: list(getattr(sample, name).items()) for name in ("metrics", "answers")}
    return {**vars(sample), **maps, "correct": sample.score == 1.0}
