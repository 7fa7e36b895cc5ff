"""Plots as inline SVG: what they say, and where they draw it."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from posttrain.report.curves import Line, Panel
from posttrain.report.plots import Axis, Dots, curve_plot, line_style, score_plot, setting_plot

SVG = "{http://www.w3.org/2000/svg}"


def panel(y: list[float], *, log: bool = False, **look: Any) -> Panel:
    settings: dict[str, Any] = {"label": "a", "colour": 3, "dash": 0} | look
    line = Line(x=[float(n) for n in range(1, len(y) + 1)], y=y, **settings)
    return Panel(key="k", title="Loss", hint="", lines=[line], log=log)


def elements(svg: str, tag: str, style: str = "") -> list[ElementTree.Element]:
    """The elements of one tag, and of one class if that is given."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}{tag}")
    return [e for e in found if not style or style in (e.get("class") or "").split()]


def ticks(svg: str, *, upright: bool) -> list[str]:
    anchor = "end" if upright else "middle"
    return [t.text or "" for t in elements(svg, "text") if t.get("text-anchor") == anchor]


@pytest.mark.parametrize(
    ("y", "log", "expected"),
    [
        ([0.001, 0.0005, 0.0001], False, ["0.0002", "0.0004", "0.0006", "0.0008", "0.001"]),
        ([1.0, 0.1, 0.001], True, ["0.001", "0.01", "0.1", "1"]),
        ([0.3, 4.0], True, ["0.5", "1", "2"]),
        ([2000.0, 12000.0], False, ["2500", "5000", "7500", "10k", "12.5k"]),
        ([-2.0, 2.0], False, ["\N{MINUS SIGN}2", "\N{MINUS SIGN}1", "0", "1", "2"]),
    ],
)
def test_ticks_say_the_values(y: list[float], log: bool, expected: list[str]):
    assert ticks(curve_plot(panel(y, log=log)), upright=True) == expected


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_ticks_differ_from_each_other(scale: float):
    found = ticks(curve_plot(panel([scale, 2 * scale, 3 * scale])), upright=True)
    assert len(found) == len(set(found)) > 1


@pytest.mark.parametrize(
    ("high", "expected"),
    [(2, [1, 2]), (5, [1, 2, 3, 4, 5]), (8, [2, 4, 6, 8]), (60, [20, 40, 60])],
)
def test_steps_are_whole_numbers(high: float, expected: list[float]):
    assert Axis(low=1, high=high, start=0, end=100).ticks(5, whole=True) == expected


@pytest.mark.parametrize("span", [2, 7, 30, 1e3, 1e6, 1e11])
def test_there_are_never_too_many_ticks(span: float):
    for log in (False, True):
        found = Axis(low=3, high=3 * span, start=0, end=1, log=log).ticks(5)
        assert 0 < len(found) <= 5
        assert all(3 <= tick <= 3 * span for tick in found)


def test_a_curve_goes_through_its_points():
    """Equal steps across; y = 1, 10, 100 are equally far apart on a logarithmic axis only."""
    for log, share in ((True, 1 / 2), (False, 9 / 99)):
        (curve,) = elements(curve_plot(panel([1.0, 10.0, 100.0], log=log)), "polyline")
        points = [tuple(map(float, p.split(","))) for p in (curve.get("points") or "").split()]
        (x0, y0), (x1, y1), (x2, y2) = points
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
        assert (y0 - y1) / (y0 - y2) == pytest.approx(share, abs=0.01)


def test_line_has_its_colour_and_dash():
    (curve,) = elements(curve_plot(panel([1.0, 2.0], dash=1)), "polyline")
    assert curve.get("style") == "stroke:var(--c3);stroke-dasharray:8 4"
    plain = panel([1.0, 2.0], colour=0).lines[0]
    assert line_style(plain) == "stroke:var(--ink);stroke-dasharray:none"


def test_one_step_is_a_plot():
    lines = [Line(label=n, colour=1, dash=0, x=[4.0], y=[y]) for n, y in (("a", 1.0), ("b", 2.0))]
    svg = curve_plot(Panel(key="k", title="Loss", hint="", lines=lines, log=False))
    assert ticks(svg, upright=False) == ["4", "5"]


def test_score_plot_places_models_by_their_accuracy():
    """From left to right: init 20 %, constant 40 %, student 70 %, teacher 90 %."""

    def value(share: float) -> dict[str, float]:
        return {"value": share, "low": share - 0.05, "high": share + 0.05}

    constant = {"value": 0.4, "response": ""}
    rows = {
        "add": {"init": value(0.2), "teacher": value(0.9), "student": value(0.7)},
        "rev": {"init": value(0.2), "teacher": None, "student": value(0.7)},
    }
    svg = score_plot(
        {"domains": {d: r | {"constant": constant} for d, r in rows.items()}}, "sampled"
    )
    assert ticks(svg, upright=True) == ["add", "rev"]
    assert ticks(svg, upright=False) == ["0", "25", "50", "75", "100"]
    init, other_init = (float(c.get("cx", "nan")) for c in elements(svg, "circle", "init"))
    student, other_student = (float(c.get("cx", "nan")) for c in elements(svg, "circle", "student"))
    assert (init, student) == (other_init, other_student)
    (mark,) = elements(svg, "path", "teacher")
    teacher = float((mark.get("d") or "M nan").removeprefix("M").split()[0])
    best, _ = (float(c.get("x1", "nan")) for c in elements(svg, "line", "constant"))
    # 20, 90, 70 and 40 % on one linear axis.
    assert (student - init) / (teacher - init) == pytest.approx(50 / 70, abs=2e-3)
    assert (best - init) / (teacher - init) == pytest.approx(20 / 70, abs=2e-3)
    interval = elements(svg, "line", "interval")[0]
    width = float(interval.get("x2", "nan")) - float(interval.get("x1", "nan"))
    assert width / (student - init) == pytest.approx(10 / 50, abs=2e-3)


def test_names_are_escaped():
    svg = curve_plot(panel([1.0, 2.0], label='a<b "c" & d'))
    assert ElementTree.fromstring(svg).get("aria-label") == 'Loss over steps: a<b "c" & d'


def dots(places: list[str], *lines: Dots) -> tuple[list[float], list[str]]:
    """Where the dots of a plot over a setting are across, and the names below the axis."""
    svg = setting_plot("accuracy over lr", places, lines, scale=100)
    return [float(dot.get("cx", "")) for dot in elements(svg, "circle")], ticks(svg, upright=False)


def line(*values: float) -> Dots:
    return Dots(label="", colour=1, values={n: [v, v] for n, v in enumerate(values)})


def test_values_of_a_setting_stand_on_a_logarithmic_axis_where_they_span_decades() -> None:
    across, names = dots(["1e-4", "1e-3", "1e-2"], line(0.1, 0.2, 0.3))
    assert across[2] - across[0] == pytest.approx(across[4] - across[2])
    assert names == ["1e-4", "1e-3", "1e-2"]
    across, _ = dots(["1", "2", "5"], line(0.1, 0.2, 0.3))
    assert across[4] - across[2] == pytest.approx(3 * (across[2] - across[0]))


def test_texts_of_a_setting_stand_side_by_side_within_the_plot() -> None:
    across, names = dots(["adam", "1", "a text that is far too long for its place"], line(1, 2, 3))
    assert across[4] - across[2] == pytest.approx(across[2] - across[0])
    assert names[:2] == ["adam", "1"] and names[2].endswith("…") and len(names[2]) < 20


def test_names_that_would_run_into_each_other_are_left_out() -> None:
    across, names = dots(["1000", "1001", "2000"], line(1, 2, 3))
    assert len(set(across)) == 3
    assert names == ["1000", "2000"]


def test_a_measure_that_is_the_same_everywhere_is_drawn() -> None:
    across, _ = dots(["1", "2"], line(0.0, 0.0))
    assert len(across) == 4
