"""Regular expressions from a file, matched as PEFT matches them, in bounded time.

A match can take longer than the age of the universe, and Python cannot interrupt it. So patterns that are hardly more
than names are matched here, and all others in a separate process, which is killed after SECONDS.
"""

from __future__ import annotations

import json
import re
import subprocess  # noqa: S404 - this interpreter with our own code; the file's patterns are data
import sys
from collections.abc import Sequence

from portllm.errors import PatchError

MAX_CHARACTERS = 65_536
MAX_STEPS = 100_000_000  # in this process, counted as if every pattern backtracked; about a second
SECONDS = 10.0

PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+")
SIMPLE = re.compile(r"\^?(?:\.\*|\\d\+|[\w-]|\\?\.)+")  # no repeat in a group: polynomial time
REPEAT = re.compile(r"\.\*|\\d\+")

WHOLE = "{}"  # re.fullmatch: target_modules and exclude_modules
TAIL = r"(.*\.)?({})$"  # re.match: keys of rank_pattern and alpha_pattern, the name or its tail after a dot

_CHILD = """
import json, re, sys
patterns, names, whole = json.load(sys.stdin)
tests = [(re.compile(p).fullmatch if whole else re.compile(p).match) for p in patterns]
json.dump([next((i for i, test in enumerate(tests) if test(name)), -1) for name in names], sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Sequence[str], form: str, where: str) -> list[int]:
    """Return for each name the index of the first pattern that matches it, or -1. `form` is WHOLE or TAIL.

    `where` names the source of the patterns in errors. Raises PatchError for an invalid pattern, or one that takes too
    long.
    """
    if not patterns or not names:
        return [-1] * len(names)
    for pattern in patterns:
        _check(pattern, form, where)
    if _steps(patterns, names) <= MAX_STEPS:
        tests = [re.compile(form.format(pattern)) for pattern in patterns]
        return [_first(tests, name, whole=form == WHOLE) for name in names]
    return _elsewhere([form.format(pattern) for pattern in patterns], names, form == WHOLE, where)


def _steps(patterns: Sequence[str], names: Sequence[str]) -> float:
    """Return an upper bound of the steps of all matches: length to the power of repeats, if each backtracks."""
    if not all(SIMPLE.fullmatch(pattern) for pattern in patterns):
        return float("inf")
    longest = max(map(len, names))
    repeats = (min(len(REPEAT.findall(pattern)), 8) for pattern in patterns)
    return len(names) * sum(float(longest) ** (1 + count) for count in repeats)


def _first(tests: Sequence[re.Pattern[str]], name: str, *, whole: bool) -> int:
    indices = (i for i, test in enumerate(tests) if (test.fullmatch(name) if whole else test.match(name)))
    return next(indices, -1)


def _check(pattern: str, form: str, where: str) -> None:
    if len(pattern) > MAX_CHARACTERS:
        raise PatchError(f"{where} has a pattern of {len(pattern)} characters, expected at most {MAX_CHARACTERS}")
    try:
        re.compile(form.format(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        short = pattern if len(pattern) <= 60 else pattern[:57] + "..."
        raise PatchError(
            f"{where}: {short!r} is not a regular expression ({error}); correct adapter_config.json"
        ) from error


def _elsewhere(patterns: Sequence[str], names: Sequence[str], whole: bool, where: str) -> list[int]:
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([patterns, names, whole]).encode(),
            capture_output=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise PatchError(
            f"{where}: took more than {SECONDS:g} s to match {len(names)} module names; expected a simpler pattern, or "
            "a list of names"
        ) from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise PatchError(f"{where}: cannot be matched ({type(error).__name__}); expected a list of names") from error
    return [int(index) for index in json.loads(result.stdout)]
