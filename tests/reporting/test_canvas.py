"""Pictures: the same bytes each time, the page's colours and ids on the page, their own as files."""

from __future__ import annotations

import re

import matplotlib as mpl
import pytest

from portllm.reporting import canvas
from portllm.reporting.heatmap import heat_map
from portllm.reporting.weights import Drift, ModuleDrift


def drawn() -> str:
    with mpl.rc_context(canvas.STYLE):
        figure = canvas.new(3, 2)
        axes = figure.subplots()
        for arm, colour in canvas.ARM_COLOURS.items():
            axes.plot([0, 1], [1, len(arm)], color=colour, marker=canvas.ARM_MARKERS[arm])
        canvas.plain_log(axes, "y", 1, 50)
        canvas.quiet(axes, grid="y")
        return canvas.svg(figure)


def test_a_picture_is_the_same_each_time_and_holds_no_clock() -> None:
    first = drawn()
    assert first == drawn()
    assert "<metadata" not in first
    assert not re.search(r"20\d\d-\d\d", first)
    assert mpl.__version__ not in first


def test_on_the_page_every_colour_is_the_pages_and_ids_are_its_own() -> None:
    first = drawn()
    inline = canvas.inline(first, name="one", label='a < b & "c"')
    for colour, variable in canvas.VARIABLES.items():
        if colour in first:
            assert f"var({variable}, {colour})" in inline
            assert not re.search(rf"(?<!, ){colour}", inline)
    assert 'aria-label="a &lt; b &amp; &quot;c&quot;"' in inline
    ids, targets = re.findall(r'\bid="([^"]+)"', inline), re.findall(r'(?:href="#|url\(#)([^")]+)', inline)
    assert all(name.startswith("one-") for name in ids)
    assert targets
    assert set(targets) <= set(ids)


def test_as_a_file_it_stands_alone() -> None:
    text = canvas.as_file(drawn())
    assert text.startswith("<?xml")
    assert "var(" not in text
    assert canvas.GROUND in text


def test_colours_can_be_told_apart_by_their_variable() -> None:
    assert len(canvas.VARIABLES) == 4 + len(canvas.ARM_COLOURS) + len(canvas.SERIES)
    assert len(set(canvas.ARM_MARKERS.values())) == len(canvas.ARM_MARKERS)


@pytest.mark.parametrize(("low", "high"), [(0.003, 0.004), (2, 48), (0.02, 30000)])
def test_a_log_axis_has_plain_numbers_whatever_its_range(low: float, high: float) -> None:
    with mpl.rc_context(canvas.STYLE):
        axes = canvas.new(3, 2).subplots()
        canvas.plain_log(axes, "x", low, high)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert 1 <= len(labels) <= 12
    assert not any("e" in label or "^" in label for label in labels)


def test_a_heat_map_of_nothing_but_zeros_is_drawn() -> None:
    modules = (ModuleDrift(module="m.0.q", layer=0, kind="q", drift_ratio=0.0),)
    drift = Drift(release="v1", against="v0", overall=0.0, modules=modules, not_compared=())
    with mpl.rc_context(canvas.STYLE):
        assert canvas.svg(heat_map([drift])).startswith("<svg")
