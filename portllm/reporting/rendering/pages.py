"""Render a page as Markdown with pictures next to it, and as one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.reporting.findings.arms import share_kept
from portllm.reporting.findings.costs import CostFindings
from portllm.reporting.findings.summary import Findings
from portllm.reporting.rendering import charts, drawing
from portllm.reporting.sections import build
from portllm.reporting.sections import formats as f
from portllm.reporting.sections.cost_tables import build_costs, cost_headline
from portllm.reporting.sections.elements import Section
from portllm.reporting.sections.headline import parts

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    value: str
    label: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page before rendering: `pictures` are SVG elements by name, `made_from` are (release, fingerprint)."""

    title: str
    headline: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    pictures: Mapping[str, str]
    made_from: Sequence[tuple[str, str]] = ()

    def write(self, folder: Path) -> None:
        """Write report.md, report.html and the pictures as NAME.svg into `folder`."""
        for name, svg in self.pictures.items():
            (folder / f"{name}.svg").write_text(drawing.as_file(svg), encoding="utf-8")
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "report.html").write_text(self.html(), encoding="utf-8")

    def markdown(self) -> str:
        """Return the page for a terminal, a repository or a tracker; it shows NAME.svg next to it."""
        text = _environment().get_template("report.md.j2").render(self._context(self.pictures))
        return str(text).rstrip() + "\n"

    def html(self) -> str:
        """Return one self-contained page: style and pictures inside, no script, nothing loaded."""
        from markupsafe import Markup

        # our own SVG: the text in it is glyphs, not markup
        inline = {
            name: Markup(drawing.inline(svg, name=name, label=charts.LABELS[name]))  # noqa: S704
            for name, svg in self.pictures.items()
        }
        return str(_environment().get_template("report.html.j2").render(self._context(inline)))

    def _context(self, pictures: Mapping[str, str]) -> dict[str, Any]:
        return {**vars(self), "pictures": pictures, "labels": charts.LABELS}


def report_page(findings: Findings) -> Page:
    """Return the report: all arms, and the weights behind them."""
    return Page(
        title="portllm report",
        headline=parts(findings),
        tiles=_tiles(findings),
        sections=build(findings),
        pictures=charts.draw(findings),
        made_from=[(name, digest or f.DASH) for name, digest in findings.fingerprints.items()],
    )


def cost_page(findings: CostFindings) -> Page:
    """Return the page of costs: seconds and memory of every stage on this machine."""
    return Page(
        title="portllm costs",
        headline=cost_headline(findings),
        tiles=_cost_tiles(findings),
        sections=build_costs(findings),
        pictures=charts.draw_costs(findings),
    )


def _tiles(findings: Findings) -> list[Tile]:
    """Return the numbers for a hurried reader: scores and recall of news, release by release."""
    tiles = []
    for release in findings.releases[1:]:
        average = findings.average(release)
        if average.ported is None:
            continue
        references = f"retuned {f.percent_sign(average.retuned)}, bare {f.percent_sign(average.base)}"
        tiles.append(Tile(f.percent_sign(average.ported), f"ported, mean on {release}", references))
        kept = share_kept(findings.recalls, release, "ported")
        if kept is not None:
            old = f.percent_sign(share_kept(findings.recalls, release, "old"))
            tiles.append(Tile(f.percent_sign(kept), f"of {release}'s news kept", f"old tuned models: {old}"))
    return tiles


def _cost_tiles(findings: CostFindings) -> list[Tile]:
    if (totals := findings.total_seconds) is None:
        return []
    port, retune = totals
    ratio = f.times(retune / port) if port > 0 else f.DASH
    return [Tile(ratio, "re-tuning time / porting time", f"{f.seconds(retune)} / {f.seconds(port)}")]


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("portllm.reporting.rendering"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return environment
