"""The paragraph follows the numbers: it reports failure where they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from portllm.reporting.findings.arms import Control
from portllm.reporting.findings.summary import Findings
from portllm.reporting.sections.headline import paragraph, verdict

FIRST = {"base": 0.5, "tuned": 0.96, "ported": 0.96}
Make = Callable[..., Findings]


def on_v1(make: Make, **arms: float) -> Findings:
    return make(
        {"v0": {"t1": FIRST, "t2": FIRST}, "v1": {"t1": arms, "t2": {"base": 0.5, "ported": 0.9, "retuned": 0.9}}}
    )


def test_paragraph_of_a_good_port_has_its_numbers(good: Findings) -> None:
    text = paragraph(good)
    assert text.startswith("The old patches carried over without training")
    for part in ("93.0%", "95.0% retuned", "50.0% for the bare release", "2 of 2 tasks", "keep 95.0%", "know 4.0%"):
        assert part in text
    assert "control holds" in text


def test_paragraph_of_a_bad_port_reports_failure(make: Make) -> None:
    bad = {"base": 0.5, "ported": 0.52, "retuned": 0.95}
    text = paragraph(make({"v0": {"t1": FIRST}, "v1": {"t1": bad}}))
    assert "did not carry over" in text
    assert "0 of 1 tasks" in text
    assert "fell short of re-tuning on t1 (−43.0 points)" in text
    assert "carried over without" not in text


def test_paragraph_of_a_port_below_the_bare_release_warns(make: Make) -> None:
    text = paragraph(on_v1(make, base=0.6, ported=0.55, retuned=0.8))
    assert "On t1 the ported patch is below the bare release: do not use it there." in text


def test_verdict_of_half_the_gain_is_in_part(make: Make) -> None:
    findings = make({"v0": {"t1": FIRST}, "v1": {"t1": {"base": 0.5, "ported": 0.8, "retuned": 0.9}}})
    assert "carried over in part: they kept 75%" in verdict(findings)


def test_one_release_that_fails_is_not_averaged_away(make: Make) -> None:
    good, bad = {"base": 0.5, "ported": 0.9, "retuned": 0.9}, {"base": 0.5, "ported": 0.55, "retuned": 0.9}
    findings = make({"v0": {"t1": FIRST}, "v1": {"t1": good}, "v2": {"t1": bad}})
    assert "some releases only" in verdict(findings)


def test_paragraph_of_a_failing_control_reports_it(good: Findings) -> None:
    wrong = dataclasses.replace(good, controls=(Control(task="t1", pairs=100, differing=3),))
    assert "control FAILS" in paragraph(wrong)
    assert "t1 (3 of 100 answers differ)" in paragraph(wrong)
    assert "not measured" in paragraph(dataclasses.replace(good, controls=()))


def test_a_failed_probe_is_named(good: Findings) -> None:
    text = paragraph(dataclasses.replace(good, probes={"v0": {"t1": 0.4, "t2": 1.0}}))
    assert "knows too little of what t1 asks about (probe below 90%)" in text


def test_where_retuning_gains_nothing_nothing_is_claimed(make: Make) -> None:
    flat, good = {"base": 0.5, "ported": 0.5, "retuned": 0.51}, {"base": 0.5, "ported": 0.9, "retuned": 0.9}
    text = verdict(make({"v0": {"t1": FIRST}, "v1": {"t1": flat}}))
    assert text == "On v1 re-tuning itself gains less than 2 points on average: there was nothing to carry over."
    mixed = verdict(make({"v0": {"t1": FIRST}, "v1": {"t1": flat}, "v2": {"t1": good}}))
    assert "kept 100%" in mixed
    assert "On v1 re-tuning itself gains less than 2 points on average, so nothing can be said there." in mixed


def test_a_patch_that_learnt_nothing_is_named(make: Make) -> None:
    later = {"base": 0.5, "ported": 0.5, "retuned": 0.9}
    text = paragraph(make({"v0": {"t1": {"base": 0.5, "tuned": 0.51, "ported": 0.51}}, "v1": {"t1": later}}))
    assert "On t1 the patch itself learnt nothing." in text
    assert "kept nothing of re-tuning's gain (0%)" in text


def test_without_retuned_arms_it_compares_with_the_bare_release(make: Make) -> None:
    above = make({"v0": {"t1": FIRST}, "v1": {"t1": {"base": 0.5, "ported": 0.9}}})
    below = make({"v0": {"t1": FIRST}, "v1": {"t1": {"base": 0.5, "ported": 0.4}}})
    assert "are above the bare release" in paragraph(above)
    assert "not above the bare release" in paragraph(below)
    assert "retuned" not in paragraph(above)


def test_paragraph_without_a_port_says_so(make: Make) -> None:
    assert "only one release" in paragraph(make({"v0": {"t1": FIRST}}))
    assert "No patch was ported" in paragraph(make({"v0": {"t1": FIRST}, "v1": {"t1": {"base": 0.5}}}))
