"""Patterns from a file match as Python's re does, and none of them can hold the program up."""

from __future__ import annotations

import re
import time

import pytest

from portllm.checkpoint.adapter import patterns
from portllm.checkpoint.adapter.patterns import MAX_CHARACTERS, TAIL, WHOLE, first_matches
from portllm.errors import PatchError

pytestmark = pytest.mark.xdist_group("timed")
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", "q_proj", "modelXlayers.0.q"]
PATTERNS = [
    "q_proj",
    "layers.0.self_attn.q_proj",
    "^model.layers.0.self_attn.q_proj",
    r"model\.layers\.0.*",
    r".*(q|up)_proj",
    r"(?:.*?(?:attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:up_proj))",
    r"(?=l)lm_\w+",
    "(?i)LM_HEAD",
    "model.layers",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_as_re_does(pattern: str) -> None:
    whole = [0 if re.fullmatch(pattern, name) else -1 for name in NAMES]
    assert first_matches([pattern], NAMES, WHOLE, "x") == whole
    if not pattern.startswith("(?i)"):
        tail = [0 if re.match(rf"(.*\.)?({pattern})$", name) else -1 for name in NAMES]
        assert first_matches([pattern], NAMES, TAIL, "x") == tail


def test_the_first_pattern_in_order_holds() -> None:
    assert first_matches(["up_proj", "q_proj", "layers.0.self_attn.q_proj"], NAMES, TAIL, "x") == [1, 0, -1, 1, -1]
    assert first_matches([r".*up_\w+", ".*q_proj", "q_proj"], NAMES, WHOLE, "x") == [1, 0, -1, 1, -1]
    assert first_matches([], NAMES, WHOLE, "x") == [-1] * len(NAMES)


def test_plain_names_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_elsewhere", lambda *_: pytest.fail("a process for a plain name"))
    assert first_matches([r"^model\.layers.0", "lm_head", r".*\.\d+\.mlp.*"], NAMES, TAIL, "x") == [-1, 2, 1, -1, -1]
    monkeypatch.setattr(patterns, "MAX_STEPS", 100)
    with pytest.raises(pytest.fail.Exception):
        first_matches(["lm_head"], NAMES, TAIL, "x")


@pytest.mark.parametrize("form", [WHOLE, TAIL])
@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*b", "(.*a){25}", "a?" * 30 + "a" * 30, "(a|aa)+$b"])
def test_a_pattern_that_would_never_end_is_ended(pattern: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    start = time.monotonic()
    name = "a" * (30 if "?" in pattern else 60) + ("" if "?" in pattern else "!")
    try:
        first_matches([pattern], [name], form, "adapter_config.json: target_modules")
    except PatchError as error:
        assert "target_modules: took more than 0.5 s" in str(error)  # noqa: PT017 - some end in time
    assert time.monotonic() - start < 20


def test_the_worst_pattern_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(PatchError, match="took more than 0.5 s to match 1 module names; expected a simpler pattern"):
        first_matches(["(a+)+b"], ["a" * 60], WHOLE, "x")


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<n>a)(?P<n>b)", "\\", "a{2,1}", "(" * 5000])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(PatchError, match="is not a regular expression"):
        first_matches([pattern], NAMES, WHOLE, "adapter_config.json: rank_pattern")


def test_an_endless_pattern_is_refused_unread() -> None:
    with pytest.raises(PatchError, match=f"{MAX_CHARACTERS + 1} characters"):
        first_matches(["a" * (MAX_CHARACTERS + 1)], NAMES, WHOLE, "x")


def test_a_process_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns.sys, "executable", "/nowhere/python")
    with pytest.raises(PatchError, match="cannot be matched .* expected a list of names"):
        first_matches(["(.*)"], NAMES, WHOLE, "x")
