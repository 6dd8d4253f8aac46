"""The report's sections in reading order."""

from __future__ import annotations

from portllm.reporting import background, scores
from portllm.reporting.findings import Findings
from portllm.reporting.layout import Section


def build(findings: Findings) -> tuple[Section, ...]:
    """All sections: what was measured first, then why and at what price."""
    makers = (
        scores.probe,
        scores.arms,
        scores.knowledge,
        background.drift,
        background.residual,
        background.training,
        background.cost,
    )
    return tuple(make(findings) for make in makers)
