"""What the pages state: findings as sections of text, tables and names of pictures, the same for Markdown and HTML.

    elements.py      Section, Table and Entry, and the names of the arms
    formats.py       numbers as text
    headline.py      the paragraph at the top, computed from the findings
    measurements.py  sections on the base probe, the arms and what they recall
    context.py       sections on drift, residual, training, published scores, and what is left out
    cost_tables.py   sections and headline of the page of costs

`build` puts the report's sections in reading order.
"""

from __future__ import annotations

from portllm.reporting.findings.summary import Findings
from portllm.reporting.sections import context, measurements
from portllm.reporting.sections.elements import Section

__all__ = ["Section", "build"]


def build(findings: Findings) -> tuple[Section, ...]:
    """Return the sections that have content: what was measured first, then its context, then what is left out."""
    later = any(row.release != findings.first for row in findings.recalls)
    sections = (
        measurements.probe(findings) if any(findings.probes.values()) else None,
        measurements.arms(findings),
        context.published(findings),
        measurements.knowledge(findings) if later else None,
        context.drift(findings),
        context.residual(findings),
        context.training(findings),
        context.absent(findings),
    )
    return tuple(section for section in sections if section is not None)
