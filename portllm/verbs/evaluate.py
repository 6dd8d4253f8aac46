"""evaluate: one model and many patches, scored with the LM Evaluation Harness over one loaded base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.files.output import refuse_file, staged_file
from portllm.checkpoint.record.provenance import digests, public_name
from portllm.checkpoint.record.records import SCHEMA_VERSION, dumps
from portllm.lm.scoring.patches import find_patches, note_idle
from portllm.lm.scoring.questions import Questions
from portllm.lm.scoring.scored import ArmScore, main_metric, write_samples
from portllm.lm.scoring.scoring import DocumentProgress, Scoring, arm_score, plan
from portllm.params import EvaluateParams


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every score of one call, `cached` of them from the cache; `as_json` is what OUT holds."""

    model: str
    fingerprint: str
    data: Mapping[str, str]
    scores: tuple[ArmScore, ...]
    cached: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the contract's shape: model, and a row per task and patch."""
        return {
            "schema_version": SCHEMA_VERSION,
            "release": Path(self.model).name,
            "data": self.data,
            "model": {"name": self.model, "fingerprint": self.fingerprint},
            "results": [score.as_json() for score in self.scores],
        }

    def lines(self) -> list[str]:
        """Return a line per score, for people."""
        rows = [(score, main_metric(score.metrics)) for score in self.scores]
        return [f"{s.task:24} {s.patch or s.arm:40} {key}={s.metrics[key]:.4f}" for s, key in rows]

    def notes(self) -> list[str]:
        """Return a note for every score on prompts that lost their beginning."""
        return [
            f"{s.task} on {s.patch or 'the base'}: {s.truncated} of {len(s.documents)} prompts are longer than the "
            "model's context; their beginning was cut off (fewer examples: --num-fewshot)"
            for s in self.scores
            if s.truncated
        ]


def run(
    *,
    model: Path,
    tasks: Sequence[str],
    out: Path,
    params: EvaluateParams,
    patches: Sequence[Path] = (),
    before: Sequence[Path] = (),
    own_task: bool = False,
    data: Path | None = None,
    news: Path | None = None,
    samples: Path | None = None,
    trust_remote_code: bool = False,
    cache: bool = True,
    on_progress: DocumentProgress | None = None,
    on_note: Callable[[str], object] = lambda _: None,
) -> Evaluation:
    """Score `model`, and every patch over it, on `tasks`; write OUT (JSON) and each example's answer (Parquet).

    `data` holds DATA/<task>/<split>.parquet; `news` is a release's corpus, whose facts and held-out text become two
    more tasks where they exist. With `own_task` a patch whose record names its task is scored on that and on the tasks
    no patch is for, not on other patches' tasks; `before` names models of an earlier release, scored only on what no
    patch is for. A score of the very same content is taken from the user's cache, unless `cache` is False. Raises
    PortllmError; then nothing is written.
    """
    for path in (out, samples):
        if path is not None:
            refuse_file(path)  # before hours of scoring
    base = fingerprint(model)
    questions = Questions(tasks, data=data, news=news, on_note=on_note)
    for name in questions.of_the_hub():
        on_note(f"{name}: its data are the hub's newest, not pinned; `portllm prepare {name}` pins them")
    entrants = find_patches(patches, before, base=base, on_note=on_note)
    note_idle(entrants, base=base, on_note=on_note)
    planned = plan(questions.names, entrants, own_task=own_task, on_note=on_note)
    scoring = Scoring(
        model, questions, params, trust_remote_code=trust_remote_code, on_progress=on_progress, on_note=on_note
    )
    scored, cached = scoring.scores(planned, cache=cache)
    result = Evaluation(
        model=public_name(model),
        fingerprint=base,
        data=digests(dict.fromkeys(questions.files(scored))),
        scores=tuple(arm_score(one.patch, score) for one, score in zip(planned, scored, strict=True)),
        cached=cached,
    )
    for note in result.notes():
        on_note(note)
    with staged_file(out) as path:
        path.write_text(dumps(result.as_json()), encoding="utf-8")
    if samples is not None:
        with staged_file(samples) as path:
            write_samples(path, result.scores)
    return result
