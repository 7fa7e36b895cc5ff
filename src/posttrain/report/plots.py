"""The plots of a report, drawn by matplotlib as SVG. The only module that imports it.

Sizes are in CSS pixels at the size a phone shows them, so that text stays readable there.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from posttrain.report.curves import Panel
from posttrain.report.svg import ACCENT, BACKGROUND, DASHES, INK, LINE, MUTED, inline, series
from posttrain.report.wording import number

PIXELS_PER_INCH = 72
"""A unit of matplotlib's SVG is a point, and 72 points are an inch."""
ROW_HEIGHT = 50
MODELS: dict[str, dict[str, Any]] = {
    "init": {"marker": "o", "markerfacecolor": BACKGROUND, "color": MUTED},
    "teacher": {"marker": "D", "markerfacecolor": INK, "color": INK},
    "student": {"marker": "o", "markerfacecolor": ACCENT, "color": ACCENT},
}
"""Shape and colour both tell the models apart."""


def curve_plot(panel: Panel, *, prefix: str) -> str:
    """One panel of training curves as an inline <svg>."""
    with _axes(prefix, width=360, height=190, left=46, right=8, top=8, bottom=26) as (figure, axes):
        for line in panel.lines:
            axes.plot(
                line.x,
                line.y,
                color=series(line.colour),
                linestyle=(0, DASHES[line.dash % len(DASHES)] or None),
                linewidth=1.5,
                solid_joinstyle="round",
            )
        if panel.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=5))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            axes.margins(y=0.08)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.margins(x=0.01)
        axes.grid(axis="y")
        names = ", ".join(line.label for line in panel.lines)
        return _write(figure, prefix, f"{panel.title} over steps: {names}")


def score_plot(domains: Mapping[str, Mapping[str, Any]], *, title: str, prefix: str) -> str:
    """Accuracies with their intervals as an inline <svg>, one band per domain.

    `domains[name]` holds init, teacher, student (value, low, high; teacher may be None) and
    constant (an accuracy).
    """
    height = 30 + ROW_HEIGHT * len(domains)
    longest = max(len(name) for name in domains)
    left = min(24 + 6.5 * longest, 150)
    with _axes(prefix, width=400, height=height, left=left, right=14, top=4, bottom=26) as (
        figure,
        axes,
    ):
        for place, row in enumerate(domains.values()):
            models = [model for model in MODELS if row[model] is not None]
            for number_of, model in enumerate(models):
                y = place + (number_of - (len(models) - 1) / 2) * 0.25
                value = {key: 100 * share for key, share in row[model].items()}
                look = MODELS[model]
                axes.plot([value["low"], value["high"]], [y, y], color=look["color"], linewidth=1.8)
                axes.plot(
                    value["value"], y, markersize=6, markeredgewidth=1.6, clip_on=False, **look
                )
            constant = 100 * row["constant"]
            axes.plot(
                [constant, constant],
                [place - 0.4, place + 0.4],
                color=MUTED,
                linewidth=1.2,
                linestyle=(0, (2, 2)),
            )
        for place in range(1, len(domains)):
            axes.axhline(place - 0.5, color=LINE, linewidth=0.8)
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.set_yticks(range(len(domains)), list(domains))
        axes.tick_params(axis="y", labelcolor=INK, labelsize=12)
        axes.set_xlim(-1, 101)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x")
        return _write(figure, prefix, title)


@contextmanager
def _axes(
    prefix: str,
    *,
    width: float,
    height: float,
    left: float,
    right: float,
    top: float,
    bottom: float,
) -> Iterator[tuple[Figure, Axes]]:
    """A figure of that size with one bare pair of axes inside those margins, all in pixels."""
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": prefix,
        "font.size": 11,
        "axes.edgecolor": LINE,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "ytick.major.size": 0,
        "xtick.major.size": 3,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH))
        FigureCanvasSVG(figure)
        axes = figure.add_axes(
            (
                left / width,
                bottom / height,
                (width - left - right) / width,
                (height - top - bottom) / height,
            ),
            facecolor="none",
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        yield figure, axes


def _write(figure: Figure, prefix: str, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline(buffer.getvalue(), prefix=prefix, title=title)
