"""Plots as inline SVG: what they say, and that they do not disturb the page around them."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from posttrain.report.curves import Line, Panel
from posttrain.report.plots import curve_plot, score_plot
from posttrain.report.svg import dash_array, inline

SVG = "{http://www.w3.org/2000/svg}"


def panel(y: list[float], *, log: bool = False, **look: Any) -> Panel:
    settings: dict[str, Any] = {"label": "a", "colour": 3, "dash": 0} | look
    line = Line(x=[float(n) for n in range(1, len(y) + 1)], y=y, **settings)
    return Panel(key="k", title="Loss", hint="", lines=[line], log=log)


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("y", "log", "ticks"),
    [
        ([0.001, 0.0005, 0.0001], False, ["0.0005", "0.001"]),
        ([1.0, 0.1, 0.001], True, ["0.001", "0.01", "0.1", "1"]),
        ([2000.0, 12000.0], False, ["10k"]),
        ([-2.0, 2.0], False, ["\N{MINUS SIGN}2", "0", "2"]),
    ],
)
def test_ticks_say_the_values(y: list[float], log: bool, ticks: list[str]):
    assert set(ticks) <= set(texts(curve_plot(panel(y, log=log), prefix="p")))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_ticks_differ_from_each_other(scale: float):
    svg = curve_plot(panel([scale, 2 * scale, 3 * scale]), prefix="p")
    upright = [
        text.text
        for text in ElementTree.fromstring(svg).iter(f"{SVG}text")
        if "text-anchor: end" in text.get("style", "")
    ]
    assert len(upright) == len(set(upright)) > 1


def test_line_has_its_colour_and_dash():
    svg = curve_plot(panel([1.0, 2.0], dash=1), prefix="p")
    dashed = [p for p in re.findall(r'style="[^"]*"', svg) if "stroke-dasharray" in p]
    assert len(dashed) == 1
    assert "stroke: var(--c3)" in dashed[0]
    assert "stroke-dasharray" not in curve_plot(panel([1.0, 2.0]), prefix="p")
    assert dash_array(0) == "none"
    assert dash_array(1) != dash_array(2)


def test_prefixes_keep_plots_apart():
    ids = [
        set(re.findall(r' id="([^"]+)"', curve_plot(panel([1.0, 2.0]), prefix=prefix)))
        for prefix in ("f1", "f2")
    ]
    assert ids[0]
    assert ids[0].isdisjoint(ids[1])


def test_score_plot_places_models_by_their_accuracy():
    """From left to right: init 20 %, constant 40 %, student 70 %, teacher 90 %."""

    def value(share: float) -> dict[str, float]:
        return {"value": share, "low": share - 0.05, "high": share + 0.05}

    rows = {
        "add": {"init": value(0.2), "teacher": value(0.9), "student": value(0.7), "constant": 0.4},
        "rev": {"init": value(0.2), "teacher": None, "student": value(0.7), "constant": 0.4},
    }
    svg = score_plot(rows, title="Accuracy", prefix="p")
    assert {"add", "rev", "0", "25", "50", "75", "100"} == set(texts(svg))
    marks = [
        (float(use.get("x", "nan")), use.get("style", ""))
        for use in ElementTree.fromstring(svg).iter(f"{SVG}use")
        if "var(--line)" not in use.get("style", "")
    ]
    x = [place for place, _ in marks]
    assert len(marks) == 5
    init, teacher, student = x[:3]
    assert x[3:] == [init, student]
    # 20, 90 and 70 % on one linear axis.
    assert (student - init) / (teacher - init) == pytest.approx(50 / 70, abs=1e-3)
    assert "var(--accent)" in marks[2][1]


def test_title_is_escaped():
    svg = inline('<svg viewBox="0 0 1 1"><g/></svg>', prefix="p", title='a<b "c" & d')
    assert ElementTree.fromstring(svg).get("aria-label") == 'a<b "c" & d'


def test_style_sheets_and_unused_ids_of_the_file_are_dropped():
    svg = inline(
        '<?xml version="1.0"?><svg viewBox="0 0 1 1"><metadata><x/></metadata>'
        '<style>*{fill:red}</style><g id="axes"><path d="M 0.12345 1" id="m"/></g>'
        '<use xlink:href="#m"/><text>0.00123</text></svg>',
        prefix="p",
        title="t",
    )
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert 'id="axes"' not in svg
    assert 'd="M 0.12 1"' in svg
    assert svg.count("p-m") == 2
    assert ">0.00123<" in svg
