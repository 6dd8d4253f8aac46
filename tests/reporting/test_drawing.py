"""Pictures: the same bytes each time, the page's colours and ids on the page, their own as files."""

from __future__ import annotations

import re

import matplotlib as mpl
import pytest

from portllm.reporting.findings.weights import Drift, ModuleDrift
from portllm.reporting.rendering import drawing
from portllm.reporting.rendering.charts import heat_map


def drawn() -> str:
    with mpl.rc_context(drawing.STYLE):
        figure = drawing.new(3, 2)
        axes = figure.subplots()
        for arm, colour in drawing.ARM_COLOURS.items():
            axes.plot([0, 1], [1, len(arm)], color=colour, marker=drawing.ARM_MARKERS[arm])
        drawing.plain_log(axes, "y", 1, 50)
        drawing.quiet(axes, grid="y")
        return drawing.svg(figure)


def test_a_picture_is_the_same_each_time_and_holds_no_clock() -> None:
    first = drawn()
    assert first == drawn()
    assert "<metadata" not in first
    assert not re.search(r"20\d\d-\d\d", first)
    assert mpl.__version__ not in first


def test_on_the_page_every_colour_is_the_pages_and_ids_are_its_own() -> None:
    first = drawn()
    inline = drawing.inline(first, name="one", label='a < b & "c"')
    for colour, variable in drawing.VARIABLES.items():
        if colour in first:
            assert f"var({variable}, {colour})" in inline
            assert not re.search(rf"(?<!, ){colour}", inline)
    assert 'aria-label="a &lt; b &amp; &quot;c&quot;"' in inline
    ids, targets = re.findall(r'\bid="([^"]+)"', inline), re.findall(r'(?:href="#|url\(#)([^")]+)', inline)
    assert all(name.startswith("one-") for name in ids)
    assert targets
    assert set(targets) <= set(ids)


def test_as_a_file_it_stands_alone() -> None:
    text = drawing.as_file(drawn())
    assert text.startswith("<?xml")
    assert "var(" not in text
    assert drawing.GROUND in text


def test_colours_can_be_told_apart_by_their_variable() -> None:
    assert len(drawing.VARIABLES) == 4 + len(drawing.ARM_COLOURS) + len(drawing.SERIES)
    assert len(set(drawing.ARM_MARKERS.values())) == len(drawing.ARM_MARKERS)


@pytest.mark.parametrize(("low", "high"), [(0.003, 0.004), (2, 48), (0.02, 30000)])
def test_a_log_axis_has_plain_numbers_whatever_its_range(low: float, high: float) -> None:
    with mpl.rc_context(drawing.STYLE):
        axes = drawing.new(3, 2).subplots()
        drawing.plain_log(axes, "x", low, high)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert 1 <= len(labels) <= 12
    assert not any("e" in label or "^" in label for label in labels)


def test_a_heat_map_of_nothing_but_zeros_is_drawn() -> None:
    modules = (ModuleDrift(module="m.0.q", layer=0, kind="q", drift_ratio=0.0),)
    drift = Drift(release="v1", against="v0", overall=0.0, modules=modules, not_compared=())
    with mpl.rc_context(drawing.STYLE):
        assert drawing.svg(heat_map([drift])).startswith("<svg")
