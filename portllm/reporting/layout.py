"""What a report is made of: sections of tables and pictures, the same for Markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass

from portllm.reporting.findings import Findings
from portllm.reporting.names import DAGGER


@dataclass(frozen=True)
class Entry:
    """One cell of a table; `tone` is empty, `good`, `bad` or `total`."""

    text: str
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """`labels` leading columns are text (left), the rest are numbers (right); `folded` ones open when asked for."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    labels: int = 1
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """`reading` says in two lines how to read it; `pictures` names figures, drawn elsewhere."""

    slug: str
    title: str
    reading: str
    pictures: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


def row(*cells: str | Entry) -> tuple[Entry, ...]:
    return tuple(cell if isinstance(cell, Entry) else Entry(cell) for cell in cells)


def task_name(findings: Findings, task: str) -> str:
    return task + (f" {DAGGER}" if task in findings.unknown_tasks else "")


def dagger(findings: Findings) -> tuple[str, ...]:
    if not findings.unknown_tasks:
        return ()
    return (f"{DAGGER} The base probe of this task failed on {findings.first}; see the first section.",)
