"""The report's sections in reading order."""

from __future__ import annotations

from portllm.reporting import background, published, scores
from portllm.reporting.findings import Findings
from portllm.reporting.layout import Section


def build(findings: Findings) -> tuple[Section, ...]:
    """All that have something to say: what was measured first, then why and at what price, then what is missing."""
    later = any(k.release != findings.first for k in findings.knowledge)
    sections = (
        scores.probe(findings) if any(findings.probes.values()) else None,
        scores.arms(findings),
        published.section(findings),
        scores.knowledge(findings) if later else None,
        background.drift(findings),
        background.residual(findings),
        background.training(findings),
        background.cost(findings),
        published.absent(findings),
    )
    return tuple(section for section in sections if section is not None)
