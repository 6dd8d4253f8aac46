"""The parts of a page, the same for Markdown and HTML: sections of tables, pictures and notes; names of arms."""

from __future__ import annotations

from dataclasses import dataclass

from portllm.reporting.findings.summary import Findings

DAGGER = "†"
ARM_NAMES = {"base": "base", "tuned": "tuned", "ported": "ported", "retuned": "retuned", "old": "old tuned"}


@dataclass(frozen=True)
class Entry:
    """One entry of a table; `tone` is empty, `good`, `bad` or `total`."""

    text: str
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """`labels` leading columns are text (left), the rest are numbers (right); a `folded` table opens on a click."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    labels: int = 1
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """`reading` explains in two lines how to read it; `pictures` are names of figures that rendering draws."""

    slug: str
    title: str
    reading: str
    pictures: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


def row(*entries: str | Entry) -> tuple[Entry, ...]:
    """Return one row of a table; a text is an entry without tone."""
    return tuple(entry if isinstance(entry, Entry) else Entry(entry) for entry in entries)


def task_name(findings: Findings, task: str) -> str:
    """Return the task's name, marked with a dagger where its probe failed."""
    return task + (f" {DAGGER}" if task in findings.unknown_tasks else "")


def dagger(findings: Findings) -> tuple[str, ...]:
    """Return the note that explains the dagger; none where no probe failed."""
    if not findings.unknown_tasks:
        return ()
    return (f"{DAGGER} The base probe of this task failed on {findings.first}; see the first section.",)
