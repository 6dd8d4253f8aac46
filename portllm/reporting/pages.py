"""report.md and report.html from the same sections: one page without network, and Markdown with pictures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from portllm.reporting import canvas
from portllm.reporting import formats as f
from portllm.reporting.findings import Findings, total_seconds
from portllm.reporting.headline import parts
from portllm.reporting.knowledge import share_kept
from portllm.reporting.layout import Section
from portllm.reporting.pictures import LABELS

if TYPE_CHECKING:
    from jinja2 import Environment

TITLE = "portllm report"


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    value: str
    label: str
    detail: str


def markdown(findings: Findings, sections: Sequence[Section], pictures: Mapping[str, str]) -> str:
    """The report for a terminal, a repository or a tracker; pictures are `NAME.svg` beside it."""
    text = _environment().get_template("report.md.j2").render(_context(findings, sections, pictures))
    return str(text).rstrip() + "\n"


def html(findings: Findings, sections: Sequence[Section], pictures: Mapping[str, str]) -> str:
    """One self-contained page: style and pictures inside, no script, nothing loaded from anywhere."""
    from markupsafe import Markup

    # our own SVG: the text in it is glyphs, not markup
    drawn = {name: Markup(_inline(name, svg)) for name, svg in pictures.items()}  # noqa: S704
    context = {**_context(findings, sections, drawn), "tiles": tiles(findings)}
    return str(_environment().get_template("report.html.j2").render(context))


def tiles(findings: Findings) -> list[Tile]:
    """What a hurried reader should see: scores per release, knowledge kept, cost."""
    made = []
    for release in findings.releases[1:]:
        average = findings.average(release)
        if average.ported is None:
            continue
        beside = f"retuned {f.percent_sign(average.retuned)}, bare {f.percent_sign(average.base)}"
        made.append(Tile(f.percent_sign(average.ported), f"ported, mean on {release}", beside))
        kept = share_kept(findings.knowledge, release, "ported")
        if kept is not None:
            old = f.percent_sign(share_kept(findings.knowledge, release, "old"))
            made.append(Tile(f.percent_sign(kept), f"of {release}'s news kept", f"old tuned models: {old}"))
    if totals := total_seconds(findings.costs):
        port, retune = totals
        ratio = f.times(retune / port) if port > 0 else f.DASH
        made.append(Tile(ratio, "re-tuning time / porting time", f"{f.seconds(retune)} / {f.seconds(port)}"))
    return made


def _inline(name: str, svg: str) -> str:
    return canvas.inline(svg, name=name, label=LABELS[name])


def _context(findings: Findings, sections: Sequence[Section], pictures: Mapping[str, str]) -> dict[str, Any]:
    return {
        "title": TITLE,
        "headline": parts(findings),
        "sections": sections,
        "pictures": pictures,
        "labels": LABELS,
        "made_from": [(name, print_ or f.DASH) for name, print_ in findings.fingerprints.items()],
    }


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("portllm.reporting"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return environment
