"""Published figures stand beside ours only where model, task and settings are theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from portllm import params
from portllm.reporting.findings import literature
from portllm.reporting.findings.literature import PublishedFigures, published_figures
from portllm.reporting.findings.summary import Findings
from portllm.reporting.sections import context

ROOT = Path(__file__).parents[2]
MISTRAL = params.load(ROOT / "profiles" / "mistral-7b.yaml")


def test_the_papers_profile_is_what_the_papers_figures_are_for() -> None:
    found = published_figures(MISTRAL)
    assert found.differences == ()
    assert {one.task for one in found.scores} == {"boolq", "winogrande", "gsm8k"}
    headline = next(one for one in found.scores if one.source == literature.PORTLLM)
    assert (headline.base, headline.retuned, headline.ported) == (0.1516, 0.3495, 0.4132)
    assert found.cost == literature.COST
    # what is known of theirs names no model for the headline, and only "Mistral" for the follow-up
    assert "which one is not known to us" in headline.setting
    assert all("which one is not known to us" in one.setting for one in found.scores)


@pytest.mark.parametrize("name", ["params.yaml", "profiles/llama-2-7b.yaml", "profiles/gemma-2-9b.yaml"])
def test_another_model_has_none(name: str) -> None:
    assert published_figures(params.load(ROOT / name)) == PublishedFigures()


def test_another_setting_has_none_and_says_why() -> None:
    other = replace(MISTRAL, train=params.override(MISTRAL.train, {"lora": {"r": 16}}, where="train"))
    assert published_figures(other) == PublishedFigures(differences=("train.lora.r is 16, theirs 8",))
    for section, change, said in (
        ("train", {"quantization": "4bit"}, "train.quantization is 4bit, theirs none"),
        ("train", {"lora": {"use_rslora": True}}, "train.lora.use_rslora is True, theirs False"),
        ("port", {"scale": 0.5}, "port.scale is 0.5, theirs 1.0"),
        ("evolve", {"mode": "full"}, "evolve.mode is full, theirs lora"),
    ):
        changed = params.override(getattr(MISTRAL, section), change, where=section)
        assert published_figures(replace(MISTRAL, **{section: changed})) == PublishedFigures(differences=(said,))
    shots = replace(MISTRAL, evaluate=replace(MISTRAL.evaluate, num_fewshot=5))
    assert published_figures(shots).differences == ("evaluate.num_fewshot is 5, theirs 0",)
    real = published_figures(params.load(ROOT / "profiles" / "mistral-7b-releases.yaml"))
    assert not real.scores
    assert "real ones" in real.differences[0]
    # a copy on disk, or a pinned revision, is still that model
    pinned = replace(MISTRAL, fetch=replace(MISTRAL.fetch, source="models/Mistral-7B-v0.1"))
    assert published_figures(pinned) == published_figures(MISTRAL)


def test_theirs_and_ours_stand_in_one_table(make: Callable[..., Findings]) -> None:
    later = {"base": 0.2, "ported": 0.6, "retuned": 0.62}
    known = published_figures(replace(MISTRAL, tasks=("gsm8k",)))
    found = make({"v0": {"gsm8k": {"base": 0.2, "tuned": 0.6}}, "openorca": {"gsm8k": later}}, published=known)
    section = context.published(found)
    assert section is not None
    rows = [[entry.text for entry in row] for row in section.tables[0].rows]
    assert [row[1] for row in rows] == [literature.PORTLLM, literature.FOLLOW_UP, "ours"]
    assert rows[0][3:] == ["15.16", "41.32", "34.95"]
    assert rows[2][3:] == ["20.00", "60.00", "62.00"]
    assert context.published(make({"v0": {"t": {"base": 0.2}}, "v1": {"t": later}})) is None
