"""The scores of one evaluation: planned, then taken from the cache or computed over one loaded base."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm import processes
from portllm.errors import OutputError
from portllm.lm.scoring import evaluation, ledger, patches, sharing
from portllm.lm.scoring.patches import OLD, EvaluatedPatch, OnNote
from portllm.lm.scoring.questions import Questions, documents
from portllm.lm.scoring.scored import ArmScore, ScoredTask
from portllm.params import EvaluateParams

DocumentProgress = Callable[[int, int, str], None]  # documents scored, of how many, what is being scored


@dataclass(frozen=True, kw_only=True)
class PlannedScore:
    """A task to be scored on a patch; None: on the bare model."""

    patch: EvaluatedPatch | None
    task: str


def plan(
    tasks: Sequence[str], entrants: Sequence[EvaluatedPatch], *, own_task: bool, on_note: OnNote = lambda _: None
) -> list[PlannedScore]:
    """Return what is scored: every task on the bare model, then on every patch.

    A model of an earlier release is scored only on tasks that no patch is for. With `own_task`, so is a patch whose
    record names its task, and on that task; a patch for a task that is not in `tasks` is left out, and noted.
    """
    owned = {patch.task for patch in entrants}
    planned = [PlannedScore(patch=None, task=task) for task in tasks]
    for patch in entrants:
        if own_task and patch.task is not None and patch.task not in tasks:
            on_note(f"{patch.name}: is for {patch.task}, which is not among the tasks; left out (--own-task)")
            continue
        restricted = patch.arm == OLD or (own_task and patch.task is not None)
        own = patch.task if patch.arm != OLD else None
        chosen = [task for task in tasks if not restricted or task not in owned or task == own]
        planned += [PlannedScore(patch=patch, task=task) for task in chosen]
    return planned


class Scoring:
    """Scores what is planned: patches over one loaded base, then merged checkpoints one after another."""

    def __init__(
        self,
        model: Path,
        questions: Questions,
        params: EvaluateParams,
        *,
        trust_remote_code: bool = False,
        on_progress: DocumentProgress | None = None,
        on_note: OnNote = lambda _: None,
    ) -> None:
        self._model, self._questions, self._params = model, questions, params
        self._trust, self._on_progress, self._on_note = trust_remote_code, on_progress, on_note
        self._identities: dict[Path, Mapping[str, Any]] = {}
        self._states: dict[Path, Mapping[str, list[int]]] = {}
        self._question_keys: dict[str, Mapping[str, Any] | None] = {}
        self._sizes: dict[str, int] = {}
        self._done = 0

    def scores(self, planned: Sequence[PlannedScore], *, cache: bool) -> tuple[list[ScoredTask], int]:
        """Return the score of each, and how many of them come from the cache.

        Raises PortllmError, before anything is loaded where a patch does not fit or holds no finite numbers.
        """
        keys = [self.key(one) for one in planned] if cache and processes.is_main() else [None] * len(planned)
        scored = {i: found for i, key in enumerate(keys) if key is not None and (found := ledger.find(key))}
        scored = sharing.from_main(scored)  # on another machine the cache is another one
        cached = len(scored)
        rest = {i: one for i, one in enumerate(planned) if i not in scored}
        self._check(rest.values())
        for i, one in self.compute(rest):
            scored[i] = one
            if (key := keys[i]) is not None and self._is_unchanged(planned[i]):
                self._keep(key, one)
        return [scored[i] for i in range(len(planned))], cached

    def key(self, planned: PlannedScore) -> dict[str, Any] | None:
        """Return everything that the score's figures depend on; None where not all of it is available."""
        for folder in self._folders(planned):
            self._states.setdefault(folder, ledger.folder_state(folder))
        if planned.task not in self._question_keys:
            self._question_keys[planned.task] = self._questions.key(planned.task)
        question = self._question_keys[planned.task]
        if question is None:
            return None
        checkpoint, *patch = [self._identity(path) for path in self._loaded(planned)]
        # batches, threads and processes decide how, not what
        settings = {name: vars(self._params)[name] for name in ("seed", "num_fewshot", "limit")}
        return {
            "task": planned.task,
            **question,
            "model": checkpoint,
            "patch": patch[0] if patch else None,
            "params": {**settings, "trust_remote_code": self._trust, "dtype": "auto"},
            "code": dict(ledger.code_identity()),
            "device": ledger.device_identity(),
        }

    def compute(self, planned: Mapping[int, PlannedScore]) -> Iterator[tuple[int, ScoredTask]]:
        """Yield every score under its number; those over the base first."""
        over_base = {i: one for i, one in planned.items() if self._loaded(one)[0] == self._model}
        groups = {self._model: over_base} if over_base else {}
        for i, one in planned.items():
            if i not in over_base:
                groups.setdefault(self._loaded(one)[0], {})[i] = one
        self._done = 0
        for checkpoint, group in groups.items():
            yield from self._on(checkpoint, group, planned)

    def _check(self, planned: Collection[PlannedScore]) -> None:
        if not processes.is_main():
            return  # the main process reads for all; where it refuses, the launcher ends the others
        folders = dict.fromkeys(folder for one in planned for folder in self._loaded(one))
        entrants = dict.fromkeys(one.patch for one in planned if one.patch is not None)
        patches.check(folders, entrants, model=self._model)

    def _on(
        self, checkpoint: Path, group: Mapping[int, PlannedScore], planned: Mapping[int, PlannedScore]
    ) -> Iterator[tuple[int, ScoredTask]]:
        """Yield the scores of a checkpoint and of the patches put on it; it is freed before the next is loaded."""
        gc.collect()  # the harness and its model refer to each other: the one before is still in memory
        harness = evaluation.Harness(checkpoint, self._params, trust_remote_code=self._trust)
        names = list(dict.fromkeys(one.task for one in group.values()))
        words = ledger.tokenizer_identity(checkpoint)
        tasks = self._questions.load(names, words, harness.tokenizer, self._params)
        self._sizes |= {name: documents(task, self._params) for name, task in tasks.items()}
        total = sum(self._sizes.get(one.task, 0) for one in planned.values())
        if self._on_progress and not self._done:
            self._on_progress(0, total, "")
        for patch in dict.fromkeys(one.patch for one in group.values()):
            with harness.patched(patch.path) if patch and not patch.merged else nullcontext():
                for i, one in group.items():
                    if one.patch == patch:
                        yield i, self._score(harness, one, tasks[one.task], total)

    def _score(self, harness: evaluation.Harness, planned: PlannedScore, task: Any, total: int) -> ScoredTask:
        what = f"{planned.patch.arm if planned.patch else 'base'} {planned.task}"
        size = self._sizes[planned.task]

        def on_answered(share: float) -> None:
            if self._on_progress:
                self._on_progress(self._done + int(share * size), total, what)

        scored = harness.score(task, on_answered=on_answered)
        self._done += size
        return scored

    def _keep(self, key: Mapping[str, Any], scored: ScoredTask) -> None:
        try:
            ledger.keep(key, scored)
        except OutputError as error:
            self._on_note(f"{error}; the scores are computed again next time")
            self._on_note = lambda _: None  # once is enough

    def _is_unchanged(self, planned: PlannedScore) -> bool:
        """Return whether the files that `key` read are still what they were then."""
        return all(ledger.folder_state(folder) == self._states[folder] for folder in self._folders(planned))

    def _loaded(self, planned: PlannedScore) -> list[Path]:
        """Return the checkpoint a task is scored on, and what is put on it."""
        if planned.patch is None:
            return [self._model]
        return [planned.patch.path] if planned.patch.merged else [self._model, planned.patch.path]

    def _folders(self, planned: PlannedScore) -> list[Path]:
        return [*self._loaded(planned), self._questions.folder(planned.task)]

    def _identity(self, path: Path) -> Mapping[str, Any]:
        if path not in self._identities:
            self._identities[path] = ledger.weights_identity(path)
        return self._identities[path]


def arm_score(patch: EvaluatedPatch | None, scored: ScoredTask) -> ArmScore:
    """Return a task's score under the name, arm and task of the patch it was scored on."""
    return ArmScore(
        task=scored.task,
        patch=patch.name if patch else None,
        arm=patch.arm if patch else "base",
        patch_task=patch.task if patch else None,
        patch_fingerprint=patch.fingerprint if patch else None,
        metrics=scored.metrics,
        documents=scored.documents,
        truncated=scored.truncated,
    )
