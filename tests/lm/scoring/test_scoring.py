"""The plan of an evaluation: every patch on every task, or each on its own where the pipeline asks for that."""

from __future__ import annotations

from pathlib import Path

from portllm.lm.scoring.patches import EvaluatedPatch
from portllm.lm.scoring.scoring import plan

TASKS = ["sst2", "rte", "news"]


def patch(name: str, task: str | None, arm: str = "ported") -> EvaluatedPatch:
    return EvaluatedPatch(path=Path(name), name=name, fingerprint=name, arm=arm, task=task, merged=False)


RECORDED, PLAIN, OLD = patch("recorded", "sst2"), patch("plain", None, "patched"), patch("before", "rte", "old")


def chosen(*entrants: EvaluatedPatch, own_task: bool, notes: list[str] | None = None) -> dict[str | None, list[str]]:
    found: dict[str | None, list[str]] = {}
    on_note = notes.append if notes is not None else lambda _: None
    for one in plan(TASKS, entrants, own_task=own_task, on_note=on_note):
        found.setdefault(one.patch.name if one.patch else None, []).append(one.task)
    return found


def test_by_hand_every_patch_is_scored_on_every_task() -> None:
    """issue 8, item 2: next to a patch with a record, one without it was not scored at all."""
    assert chosen(RECORDED, PLAIN, own_task=False) == {None: TASKS, "recorded": TASKS, "plain": TASKS}


def test_own_task_keeps_a_recorded_patch_to_its_task_and_to_those_of_no_patch() -> None:
    """issue 8, item 2."""
    other = patch("other", "rte")
    expected = {None: TASKS, "recorded": ["sst2", "news"], "other": ["rte", "news"], "plain": TASKS}
    assert chosen(RECORDED, other, PLAIN, own_task=True) == expected


def test_an_earlier_release_s_models_are_scored_on_what_no_patch_is_for() -> None:
    for own_task in (False, True):
        assert chosen(RECORDED, OLD, own_task=own_task)["before"] == ["news"]


def test_own_task_leaves_a_patch_for_a_task_that_is_gone_out_and_says_so() -> None:
    """issue 8, items 2 and 8."""
    notes: list[str] = []
    orphan = patch("orphan", "wnli")
    assert chosen(RECORDED, orphan, own_task=True, notes=notes) == {None: TASKS, "recorded": TASKS}
    assert notes == ["orphan: is for wnli, which is not among the tasks; left out (--own-task)"]
    assert chosen(orphan, own_task=False)["orphan"] == TASKS
