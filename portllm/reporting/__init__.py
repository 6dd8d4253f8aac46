"""The report, from results on disk to pages. Each room imports the rooms before it, none after it.

    results.py   read and check: scores with samples, curves, release records; costs apart from them
    findings/    compute: arms, weights, published figures, costs; `Findings` is everything the report states
    sections/    state: findings as text, tables and names of pictures
    rendering/   draw and write: Markdown, HTML, SVG, metrics.json, CSV

Public names, imported on first use: `read`, `orphans`, `find`, `Findings`, `paragraph`, `report_page` for the report;
`read_costs`, `find_costs`, `CostFindings`, `cost_page` for the page of costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm import lazy

if TYPE_CHECKING:
    from portllm.reporting.findings.costs import CostFindings, find_costs
    from portllm.reporting.findings.summary import Findings, find
    from portllm.reporting.rendering.pages import cost_page, report_page
    from portllm.reporting.results import orphans, read, read_costs
    from portllm.reporting.sections.headline import paragraph

_HOMES = {
    "CostFindings": "findings.costs",
    "Findings": "findings.summary",
    "cost_page": "rendering.pages",
    "find": "findings.summary",
    "find_costs": "findings.costs",
    "orphans": "results",
    "paragraph": "sections.headline",
    "read": "results",
    "read_costs": "results",
    "report_page": "rendering.pages",
}
__all__ = [
    "CostFindings",
    "Findings",
    "cost_page",
    "find",
    "find_costs",
    "orphans",
    "paragraph",
    "read",
    "read_costs",
    "report_page",
]


__getattr__ = lazy.exporter(__name__, _HOMES)
