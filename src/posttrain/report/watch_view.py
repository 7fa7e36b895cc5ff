"""Stages at this moment in a terminal: what they do, small curves, and their newest samples."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posttrain.report.curves import COUNTERS, METRICS, in_sentence
from posttrain.report.live import SYMBOLS
from posttrain.report.samples import Sample
from posttrain.report.watching import SAID, Watched
from posttrain.report.wording import number

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40
"""Of a curve, in characters."""
MOST_CURVES = 5
MOST_METRICS = 8
MOST_SAMPLES = 3
TEXT = 160
"""Characters of a sample's text."""


def watch_view(detailed: Sequence[Watched], others: Sequence[Watched]) -> RenderableType:
    """The stages `detailed` with all there is to see, the others on a line each."""
    parts: list[RenderableType] = []
    if others:
        parts.append(_table(others))
    for one in detailed:
        parts += [Text()] if parts else []
        parts += [_title(one), *_about(one)]
    return Group(*parts)


def _table(stages: Sequence[Watched]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for one in stages:
        symbol, style = SYMBOLS[one.state]
        said = one.progress.reason.splitlines()[:1] or [one.progress.facts]
        table.add_row(
            Text(symbol, style),
            Text(one.name),
            Text(one.facts.kind, "dim"),
            Text(SAID.get(one.state, one.state), style),
            Text(said[0], "dim"),
        )
    return table


def _title(one: Watched) -> Text:
    """Symbol, name, and how far it is."""
    symbol, style = SYMBOLS[one.state]
    said = "" if one.state == "running" else f"{SAID.get(one.state, one.state)}, "
    return Text.assemble(
        (f"{symbol} ", style),
        (one.name, "bold"),
        (f" ({one.facts.kind})  ", "dim"),
        f"{said}{one.progress.facts}",
    )


def _about(one: Watched) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if one.progress.reason:
        parts.append(Text(f"  {one.progress.reason.splitlines()[0]}", "yellow"))
    parts += [Text(f"  warning: {text}", "yellow") for text in one.facts.warnings]
    curves = dict(list(one.curves.items())[:MOST_CURVES])
    if curves:
        parts.append(_curves(one, curves))
    if rest := _rest(one, curves):
        parts.append(Text(f"  {rest}", "dim"))
    for sample in one.newest_samples[:MOST_SAMPLES]:
        parts.append(Padding(_sample(sample), (0, 0, 0, 2)))
    return parts


def _curves(one: Watched, curves: dict[str, list[float]]) -> Table:
    """A line per metric: title, curve, first and newest value."""
    table = Table.grid(padding=(0, 2, 0, 0))
    titles = one.facts.kind_row.titles
    for key, values in curves.items():
        title = titles.get(key) or (METRICS[key].title if key in METRICS else key)
        table.add_row(
            Text(f"  {in_sentence(title)}"),
            Text(sparkline(values), "cyan"),
            Text(f"{number(values[0])} → {number(values[-1])}"),
        )
    return table


def _rest(one: Watched, curves: dict[str, list[float]]) -> str:
    """The other numbers of the newest line, but for those of single domains."""
    found = [
        f"{name} {number(value)}"
        for name, value in one.progress.metrics.items()
        if name not in COUNTERS and name not in curves and "/" not in name
    ]
    return ", ".join(found[:MOST_METRICS])


def _sample(sample: Sample) -> Table:
    """One row: its numbers, then its texts, each on a line."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    numbers = [
        f"{name} {number(value)}" for name, value in sample.numbers.items() if name != "finished"
    ]
    if sample.numbers.get("finished") == 0:
        numbers.append("cut off")
    head = [f"after step {sample.step}", sample.domain, *numbers]
    table.add_row("sample", Text(", ".join(filter(None, head)), "dim"))
    for name, text in sample.texts.items():
        table.add_row(f"  {name}", Text(one_line(text)))
    return table


def one_line(text: str, limit: int = TEXT) -> str:
    """A text on a line, with a sign for every new line, the end of a long one left out."""
    flat = "⏎".join(part.strip() for part in text.strip().splitlines())
    return flat if len(flat) <= limit else f"{flat[: limit - 1]}…"


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve of at most `width` characters, each the mean of as many neighbours.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
    '▁▂▃▄▅▆▇█'
    """
    each = -(-len(values) // width)
    parts = [values[start : start + each] for start in range(0, len(values), each)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    if high == low:
        return BARS[len(BARS) // 2 - 1] * len(means)
    scale = (len(BARS) - 1) / (high - low)
    return "".join(BARS[round((mean - low) * scale)] for mean in means)
