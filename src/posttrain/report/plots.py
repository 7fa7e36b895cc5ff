"""The plots of a report as inline SVG.

Lengths are in CSS pixels at the size a phone shows a plot, so that text stays readable there.
Colours and fonts are left to the page's style sheet, hence a plot follows dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from posttrain.report.candidates import accuracy, columns, first_view
from posttrain.report.curves import LOG_SPAN, Line, Panel
from posttrain.report.scores import DECODING_NAMES, MODELS, Evaluation, decoded
from posttrain.report.wording import number

DASHES = ("none", "8 4", "2 3", "10 3 2 3")
"""Patterns of lines as values of stroke-dasharray."""
BOTTOM = 26
"""Room for the ticks of the horizontal axis."""
BAND = 50
"""Height of one domain in a plot of scores."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Numbers from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a number."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int, *, whole: bool = False) -> list[float]:
        """At most `most` round numbers of the axis, with `whole` none but integers."""
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            steps = (1,) if len(exponents) > 3 else (1, 3) if len(exponents) > 2 else (1, 2, 5)
            found = [step * 10.0**exponent for exponent in exponents for step in steps]
            found = [tick for tick in found if self.low <= tick <= self.high]
            return found[:: math.ceil(len(found) / most)]
        decade = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        for step in (decade * factor for factor in (1, 2, 2.5, 5, 10, 20, 25, 50)):
            first, last = math.ceil(self.low / step), math.floor(self.high / step)
            if last - first < most and (not whole or step == int(step)):
                break
        return [n * step for n in range(first, last + 1)]


def curve_plot(panel: Panel) -> str:
    """One panel of training curves as an <svg> element, in the colours of the domains."""
    width, height, left = 360, 190, 46
    steps = [x for line in panel.lines for x in line.x]
    values = [y for line in panel.lines for y in line.y]
    low, high = min(values), max(values)
    if panel.log:
        low, high = low / (high / low) ** 0.05, high * (high / low) ** 0.05
    else:
        edge = 0.08 * (high - low)
        low, high = low - edge, high + edge
    across = Axis(
        low=min(steps), high=max(max(steps), min(steps) + 1), start=left + 3, end=width - 8
    )
    upwards = Axis(low=low, high=high, start=height - BOTTOM, end=8, log=panel.log)
    parts = [_line(left, y, width - 8, y, "grid") for y in map(upwards.at, upwards.ticks(5))]
    parts += [_text(left - 6, upwards.at(y) + 4, number(y), "end") for y in upwards.ticks(5)]
    parts += _floor(across, height, left, width - 8, across.ticks(5, whole=True))
    for line in panel.lines:
        points = " ".join(
            f"{across.at(x):.1f},{upwards.at(y):.1f}" for x, y in zip(line.x, line.y, strict=True)
        )
        parts.append(f'<polyline class="curve" style="{line_style(line)}" points="{points}"/>')
    names = ", ".join(line.label for line in panel.lines)
    return _svg(width, height, f"{panel.title} over steps: {names}", parts)


def line_style(line: Line) -> str:
    """The CSS of a curve: the colour of its domain, and what sets it apart within the domain."""
    colour = f"--c{line.colour}" if line.colour else "--ink"
    return f"stroke:var({colour});stroke-dasharray:{DASHES[line.dash % len(DASHES)]}"


def score_plot(evaluation: Evaluation, decoding: str) -> str:
    """Accuracies of init, teacher and student with their intervals as an <svg> element.

    One band per domain; a dashed line says what the best constant answer scores.
    """
    domains = evaluation["domains"]
    width, height = 400, BOTTOM + 8 + BAND * len(domains)
    left = min(24 + 6.5 * max(map(len, domains)), 150)
    across = Axis(low=-0.01, high=1.01, start=left, end=width - 14)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    floor = height - BOTTOM
    parts = [_line(x, 4, x, floor, "grid") for x in map(across.at, ticks)]
    parts += _floor(across, height, left, width - 14, ticks, scale=100)
    for place, (name, row) in enumerate(domains.items()):
        middle = 4 + BAND * (place + 0.5)
        if place:
            parts.append(_line(left, middle - BAND / 2, width - 14, middle - BAND / 2, "grid"))
        parts.append(_text(left - 6, middle + 4, name, "end", "name"))
        constant = across.at(row["constant"]["value"])
        parts.append(_line(constant, middle - 20, constant, middle + 20, "constant"))
        cells = decoded(row, decoding)
        models = [model for model in MODELS if cells[model] is not None]
        for number_of, model in enumerate(models):
            y = middle + (number_of - (len(models) - 1) / 2) * 12.5
            low, value, high = (across.at(cells[model][key]) for key in ("low", "value", "high"))
            parts.append(_line(low, y, high, y, f"interval {model}"))
            parts.append(
                f'<circle class="{model}" cx="{value:.1f}" cy="{y:.1f}" r="3.5"/>'
                if model != "teacher"
                else f'<path class="teacher" d="M{value:.1f} {y - 5:.1f}l5 5-5 5-5-5Z"/>'
            )
    return _svg(width, height, f"Accuracy per domain, {DECODING_NAMES[decoding]}", parts)


def ladder_plot(evaluation: Evaluation, domain: str) -> str:
    """One domain's accuracies of all models, one under the other, as an <svg> element.

    From init over the models along the way to the students; the first ones are joined by a line. A
    dashed line says what the best constant answer scores.
    """
    models = columns(evaluation)
    longest = max(len(model.title) for model in models)
    # Names that leave no room beside the dots stand above them.
    above = longest > 22
    step, width = 38 if above else 24, 360
    height = BOTTOM + 8 + step * len(models)
    left = 14 if above else 20 + 6.6 * longest
    across = Axis(low=-0.01, high=1.01, start=left, end=width - 10)
    floor, ticks = height - BOTTOM, [0, 0.25, 0.5, 0.75, 1]
    parts = [_line(x, 4, x, floor, "grid") for x in map(across.at, ticks)]
    parts += _floor(across, height, left, width - 10, ticks, scale=100)
    row = first_view(evaluation)["domains"][domain]
    constant = across.at(row["constant"]["value"])
    parts.append(_line(constant, 4, constant, floor, "constant"))
    rungs: list[str] = []
    for place, model in enumerate(models):
        y = 4 + step * (place + (0.72 if above else 0.5))
        if above:
            parts.append(_text(left, y - 10, model.title, "start", "name"))
        else:
            parts.append(_text(left - 6, y + 4, model.title, "end", "name"))
        sampled, greedy = (accuracy(evaluation, model, domain, d) for d in DECODING_NAMES)
        if sampled is None or greedy is None:
            continue
        low, value, high = (across.at(sampled[key]) for key in ("low", "value", "high"))
        if model.role in ("init", "along"):
            rungs.append(f"{value:.1f},{y:.1f}")
        # Hollow dots are greedy; init is drawn as the models along the way.
        style = "along" if model.role == "init" else model.role
        parts.append(_line(low, y, high, y, f"interval {style}"))
        parts.append(
            f'<circle class="init" cx="{across.at(greedy["value"]):.1f}" cy="{y:.1f}" r="3"/>'
        )
        parts.append(f'<circle class="{style}" cx="{value:.1f}" cy="{y:.1f}" r="3.5"/>')
    if len(rungs) > 1:
        parts.append(f'<polyline class="ladder" points="{" ".join(rungs)}"/>')
    return _svg(width, height, f"Accuracy of all models in {domain}", parts)


@dataclass(frozen=True, kw_only=True)
class Dots:
    """One line over an axis of settings: through the means, with a dot for every value."""

    label: str
    colour: int
    values: Mapping[int, Sequence[float]]
    """Place on the axis -> the values there."""


def setting_plot(
    title: str, places: Sequence[str], lines: Sequence[Dots], *, scale: float = 1
) -> str:
    """A measure over the values of one setting as an <svg> element.

    `places` are the values as they were written: where all are numbers they stand at their place,
    on a logarithmic axis where they span a factor of `LOG_SPAN`; else side by side. `scale` is what
    the ticks of the measure are multiplied with.
    """
    width, height, left, right = 360, 220, 46, 350
    log, at = _places(places, left, right)
    found = [value for line in lines for values in line.values.values() for value in values]
    edge = 0.08 * (max(found) - min(found)) or 0.05 * abs(max(found)) or 0.05
    upwards = Axis(low=min(found) - edge, high=max(found) + edge, start=height - BOTTOM, end=8)
    parts = [_line(left, y, right, y, "grid") for y in map(upwards.at, upwards.ticks(5))]
    parts += [
        _text(left - 6, upwards.at(y) + 4, number(scale * y), "end") for y in upwards.ticks(5)
    ]
    parts.append(_line(left, height - BOTTOM, right, height - BOTTOM, "axis"))
    parts += _place_names(places, at, height - BOTTOM, (right - left) / len(places))
    for line in lines:
        colour = f"var(--c{line.colour})"
        means = {place: sum(v) / len(v) for place, v in line.values.items() if v}
        points = " ".join(
            f"{at[place]:.1f},{upwards.at(means[place]):.1f}"
            for place in sorted(means, key=at.__getitem__)
        )
        parts.append(f'<polyline class="curve" style="stroke:{colour}" points="{points}"/>')
        parts += [
            f'<circle style="fill:{colour}" cx="{at[place]:.1f}" cy="{upwards.at(value):.1f}" '
            'r="3" opacity=".65"/>'
            for place, values in line.values.items()
            for value in values
        ]
    scale_name = ", logarithmic" if log else ""
    return _svg(width, height, f"{title}{scale_name}", parts)


def _places(places: Sequence[str], start: float, end: float) -> tuple[bool, dict[int, float]]:
    """Whether the axis is logarithmic, and the pixel of each of its values."""
    values = as_numbers(places)
    if values is None or len(set(values)) < 2:
        band = (end - start) / len(places)
        return False, {n: start + (n + 0.5) * band for n in range(len(places))}
    log = is_log(values)
    axis = Axis(low=min(values), high=max(values), start=start + 22, end=end - 22, log=log)
    return log, {n: axis.at(value) for n, value in enumerate(values)}


def as_numbers(texts: Sequence[str]) -> list[float] | None:
    """The texts as finite numbers, None where one is none."""
    try:
        found = [float(text) for text in texts]
    except ValueError:
        return None
    return found if all(map(math.isfinite, found)) else None


def is_log(values: Sequence[float]) -> bool:
    """Whether numbers are better seen on a logarithmic axis."""
    return min(values) > 0 and max(values) >= LOG_SPAN * min(values)


def _place_names(
    places: Sequence[str], at: Mapping[int, float], y: float, room: float
) -> list[str]:
    """Ticks at the places, named as far as their names do not run into each other."""
    parts: list[str] = []
    free = -math.inf
    for place in sorted(at, key=at.__getitem__):
        name = places[place]
        most = max(3, int(room / 6.4))
        name = name if len(name) <= most else f"{name[: most - 1]}…"
        parts.append(_line(at[place], y, at[place], y + 3, "axis"))
        half = 3.1 * len(name)
        if at[place] - half > free:
            parts.append(_text(at[place], y + 16, name, "middle"))
            free = at[place] + half + 4
    return parts


def _floor(
    axis: Axis, height: float, left: float, right: float, ticks: Iterable[float], scale: float = 1
) -> list[str]:
    """The line at the bottom with its ticks, named by their number times `scale`."""
    y = height - BOTTOM
    parts = [_line(left, y, right, y, "axis")]
    for tick in ticks:
        x = axis.at(tick)
        parts += [_line(x, y, x, y + 3, "axis"), _text(x, y + 16, number(scale * tick), "middle")]
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
