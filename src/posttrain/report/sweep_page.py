"""sweep.html: one self-contained page about all runs of a sweep, without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from posttrain.engine.atomic import remove_parts, write_whole
from posttrain.report import plots, wording
from posttrain.report import sweep as tables
from posttrain.report.curves import Panel, overlaid
from posttrain.report.gather import COLOURS, StageFacts
from posttrain.report.html import environment, style
from posttrain.report.plots import Dots
from posttrain.report.sweep import Outcome, Sweep

MOST_LINES = 24
"""More curves than that in one plot tell nothing."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A stage of the recipe, as the sweep made it."""

    name: str
    kind: str
    different: int
    """How many there are of it."""
    wanted: int
    """In how many of the runs it occurs."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the sweep, with what it logged."""

    name: str
    """As the recipe calls it."""
    setting: int
    seed: int
    """Of the first run that needs it, as is `setting`."""
    facts: StageFacts


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One plot over an axis."""

    title: str
    axis: str
    log: bool
    svg: Markup
    lines: Sequence[Dots]


def write_sweep_page(
    path: Path,
    *,
    sweep: Sweep,
    made: Outcome,
    shared: Sequence[Shared],
    stages: Sequence[Stage],
    commands: Sequence[str],
    warnings: Sequence[Mapping[str, Any]],
    source: str,
) -> None:
    """Write the page to `path`; it appears whole or not at all.

    `commands` says for each setting how to make it by itself; `source` is the recipe's text.
    """
    page = environment()
    page.globals |= {"wording": wording, "tables": tables, "plots": plots}
    text = page.get_template("sweep.html").render(
        style=style(),
        sweep=sweep,
        made=made,
        charts=charts(sweep, made),
        curves=curves(sweep, stages),
        colours=[colour_of(number) for number in range(len(sweep.settings))],
        shared=shared,
        num_stages=sum(stage.different for stage in shared),
        num_wanted=sum(stage.wanted for stage in shared),
        commands=commands,
        warnings=warnings,
        seconds=sum(stage.facts.seconds for stage in stages),
        source=source,
    )
    remove_parts(path.parent, path.name)
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def colour_of(setting: int) -> int:
    """The number of a setting's colour in the style sheet."""
    return setting % COLOURS + 1


def charts(sweep: Sweep, made: Outcome) -> list[Chart]:
    """The metric over each axis that has several values, with a dot per seed; a line for every
    combination of the other axes."""
    if made.metric is None:
        return []
    unit = made.units[made.metric]
    found = []
    for axis, places in sweep.axes.items():
        lines = _lines(sweep, made, axis, made.metric)
        if len(places) < 2 or not lines:
            continue
        title = f"{made.title(made.metric)} over {axis}"
        values = plots.as_numbers(places)
        svg = plots.setting_plot(title, places, lines, scale=100 if unit == "percent" else 1)
        found.append(
            Chart(
                title=made.title(made.metric),
                axis=axis,
                log=values is not None and plots.is_log(values),
                svg=Markup(svg),
                lines=lines,
            )
        )
    return found


def _lines(sweep: Sweep, made: Outcome, axis: str, metric: str) -> list[Dots]:
    places = {value: place for place, value in enumerate(sweep.axes[axis])}
    found: dict[str, dict[int, list[float]]] = {}
    for row in made.rows:
        setting = sweep.settings[row.setting]
        label = ", ".join(f"{key}={value}" for key, value in setting.items() if key != axis)
        if metric in row.measures:
            values = list(row.measures[metric].values.values())
            found.setdefault(label, {})[places[setting[axis]]] = values
    return [
        Dots(label=label, colour=colour_of(number), values=values)
        for number, (label, values) in enumerate(found.items())
    ]


def curves(sweep: Sweep, stages: Sequence[Stage]) -> Mapping[str, list[Panel]]:
    """The learning curves of every stage that the axes or the seeds change: colour means setting,
    of several that share a stage the first, and the pattern of a line means seed."""
    groups: dict[str, list[Stage]] = {}
    for stage in stages:
        if stage.facts.kind_row.panels:
            groups.setdefault(stage.name, []).append(stage)
    found = {}
    for name, group in groups.items():
        if not 1 < len(group) <= MOST_LINES:
            continue
        panels = overlaid(
            [
                (
                    f"{sweep.words(stage.setting)}, seed {stage.seed}".removeprefix(", "),
                    colour_of(stage.setting),
                    list(sweep.seeds).index(stage.seed),
                    stage.facts,
                )
                for stage in group
            ]
        )
        if panels:
            found[name] = panels
    return found
