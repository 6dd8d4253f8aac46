"""What was scored before is believed where it is exactly what it should be, and nowhere else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from portllm.lm.scoring import ledger
from portllm.lm.scoring.scored import Sample, Scored

KEY: dict[str, Any] = {"task": "sst2", "model": {"fingerprint": "ab"}, "params": {"limit": 0}}


def scored(task: str = "sst2") -> Scored:
    right = Sample(doc_id=0, score=1.0, answer="1", target="1", metrics={"acc,none": 1.0}, loglikelihoods=(-1.25, -0.1))
    words = Sample(doc_id=1, score=0.0, answer="ünï\n\ud800"[:4], target="", answers={"none": "x"})
    return Scored(task=task, split="validation", metrics={"acc,none": 1 / 3}, samples=(right, words))


def entry(cache: Path) -> Path:
    (found,) = cache.rglob("scores/*/*.json")
    return found


def test_what_is_kept_is_found_again_to_the_last_digit(private_cache: Path) -> None:
    assert ledger.find(KEY) is None
    ledger.keep(KEY, scored())
    assert ledger.find(KEY) == scored()
    assert entry(private_cache).is_file()


def test_not_a_number_survives(private_cache: Path) -> None:
    strange = Scored(
        task="sst2", split="test", metrics={"acc,none": 0.0},
        samples=(Sample(doc_id=0, score=math.nan, answer="", target=""),),
    )  # fmt: skip
    ledger.keep(KEY, strange)
    found = ledger.find(KEY)
    assert found is not None
    assert math.isnan(found.samples[0].score)


@pytest.mark.parametrize("other", [{"task": "rte"}, {"model": {"fingerprint": "ac"}}, {"params": {"limit": 1}}])
def test_another_key_finds_nothing(other: dict[str, Any]) -> None:
    ledger.keep(KEY, scored())
    assert ledger.find({**KEY, **other}) is None


def test_an_entry_moved_to_another_s_place_is_not_believed(private_cache: Path) -> None:
    ledger.keep(KEY, scored())
    text = entry(private_cache).read_bytes()
    entry(private_cache).unlink()
    other = {**KEY, "params": {"limit": 5}}
    ledger.keep(other, scored())
    entry(private_cache).write_bytes(text)
    assert ledger.find(other) is None


def test_no_changed_byte_is_believed(private_cache: Path) -> None:
    ledger.keep(KEY, scored())
    path = entry(private_cache)
    text = path.read_bytes()
    for at in range(0, len(text), 3):
        path.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        assert ledger.find(KEY) in (None, scored()), text[at - 20 : at + 20]
        path.write_bytes(text[:at])
        assert ledger.find(KEY) is None


def _retold(text: str, change: Any) -> str:
    """An entry with what it tells changed, and its digest made to fit."""
    tree = json.loads(text)
    change(tree["scored"])
    return json.dumps({**tree, "digest": ledger._digest(tree["scored"])})


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(task="rte"),
        lambda told: told["metrics"].update({"acc,none": "0.9"}),
        lambda told: told["metrics"].update({"acc,none": True}),
        lambda told: told["samples"][0].update(doc_id=1.5),
        lambda told: told["samples"][0].update(answers=[]),
        lambda told: told["samples"][0].pop("score"),
        lambda told: told.update(samples=None),
    ],
)
def test_values_of_another_kind_are_not_believed(private_cache: Path, change: Any) -> None:
    ledger.keep(KEY, scored())
    path = entry(private_cache)
    path.write_text(_retold(path.read_text("utf-8"), change), "utf-8")
    assert ledger.find(KEY) is None


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 100_000, "\udcff"])
def test_any_other_file_in_its_place_is_as_good_as_none(private_cache: Path, text: str) -> None:
    ledger.keep(KEY, scored())
    entry(private_cache).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert ledger.find(KEY) is None


def test_a_cache_that_cannot_be_written_is_no_error(private_cache: Path) -> None:
    (private_cache / "portllm").write_text("a file where the directory should be")
    ledger.keep(KEY, scored())
    assert ledger.find(KEY) is None
