"""What the tables of an evaluation in the terminal are made of.

Where a terminal is narrow a table turns, or its cells fold. Nothing is ever cut off with an
ellipsis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posttrain.report.scores import DECODINGS, Forgetting
from posttrain.report.wording import DASH, fixed, percent, percent_range, ratio_range

_UNBOUNDED = 1000
"""Columns that no table here fills."""


@dataclass(frozen=True, kw_only=True)
class FirstFit:
    """Draws the first of its choices that fits the width, the last one if none does."""

    choices: Sequence[RenderableType]
    """From wide to narrow."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.update(width=_UNBOUNDED)
        for choice in self.choices:
            if Measurement.get(console, free, choice).maximum <= options.max_width:
                yield choice
                return
        yield self.choices[-1]


def title(text: str, remark: str) -> Text:
    """A heading with a remark beside it."""
    return Text.assemble((text, "bold"), "  ", (remark, "dim"))


def part(text: str, remark: str, *choices: RenderableType) -> list[RenderableType]:
    """A table under its heading, in the first of these forms that fits."""
    return [Text(), title(text, remark), FirstFit(choices=choices)]


def line(text: str, style: str) -> RenderableType:
    """A sentence under a table."""
    return Padding(Text(text, style=style), (0, 0, 0, 2))


def row_title(name: str, decoding: str) -> Text:
    """The first row of a pair bears the name and is the one at temperature 1."""
    return Text(name, "bold") if decoding == DECODINGS[0] else Text(f"  {decoding}", "dim")


def cell(value: str, interval: str = "", style: str = "") -> Text:
    """A value and its interval; values of a column stand under each other. A column that is too
    narrow breaks the line between the two."""
    return Text.assemble((value.rjust(5), style), (f" {interval}" if interval else "", "dim"))


def accuracy(value: Mapping[str, float] | None, digits: int) -> Text:
    """In per cent, with `digits` decimals in the interval."""
    if value is None:
        return cell(DASH)
    return cell(percent(value["value"]), percent_range(value, digits))


def recovery(value: Mapping[str, float] | None) -> Text:
    """A recovery and its interval."""
    if value is None:
        return cell(DASH)
    return cell(fixed(value["value"], 2), ratio_range(value["low"], value["high"]), "bold")


def plain_table() -> Table:
    """Where a column does not fit its cells are folded, never cut."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")


def matrix_part(matrix: Forgetting | None) -> list[RenderableType]:
    """All models on all domains; nothing where there is nothing to say of that."""
    if matrix is None:
        return []
    tables = (_matrix_table(matrix, numbered=numbered) for numbered in (False, True))
    return part("Every model on every domain, %", "temperature 1; own domain bold", *tables)


def _matrix_table(matrix: Forgetting, *, numbered: bool) -> Table:
    """`numbered` calls the domains 1, 2, ... in the header, for narrow terminals."""
    keys = [str(number + 1) for number in range(len(matrix.domains))]
    table = plain_table()
    table.add_column("model", overflow="fold")
    for title in keys if numbered else matrix.domains:
        table.add_column(title, justify="right", overflow="fold")
    for name, cells in matrix.rows.items():
        plain = matrix.roles[name] == "init"
        row = [Text(name, style="dim" if plain else "")]
        row += [
            Text(percent(one.value), style="bold green" if one.own else "dim" if plain else "")
            for one in cells
        ]
        table.add_row(*row, end_section=plain)
    if numbered:
        legend = zip(keys, matrix.domains, strict=True)
        table.caption = " · ".join(f"{key} {domain}" for key, domain in legend)
        table.caption_justify = "left"
    return table
