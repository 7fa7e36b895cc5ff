"""The tables of an evaluation in the terminal.

Where a terminal is narrow, intervals lose their decimals and then stand under their values. Nothing
is ever cut off with an ellipsis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posttrain.report.scores import (
    DECODINGS,
    MODELS,
    Evaluation,
    Forgetting,
    constant_domains,
    decoded,
    forgetting,
    has_teachers,
    norm_coverage,
    notes,
    split_name,
    verdict,
)
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


def warnings_list(warnings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Warnings, {"stage": name or None, "text": sentence} each, one under the other."""
    title = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    table = Table.grid(padding=(0, 2, 0, 0))
    for warning in warnings:
        table.add_row(Text(warning["stage"] or "recipe", "yellow"), Text(warning["text"]))
    return Group(Text(title, "bold yellow"), table)


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """Accuracies with intervals and recovery per domain, then what each teacher forgot.

    `evaluation` is the content of evaluation.json.
    """
    parts: list[RenderableType] = [
        _title(f"Accuracy on {split_name(evaluation)} problems, %", "95 % bootstrap intervals"),
        FirstFit(choices=[_scores(evaluation, digits) for digits in (1, 0)]),
    ]
    if said := verdict(evaluation):
        style = "bold" if evaluation["gain"]["low"] > 0 else "bold yellow"
        parts.append(Padding(Text(said, style=style), (0, 0, 0, 2)))
    parts += [Padding(Text(note, style="yellow"), (0, 0, 0, 2)) for note in notes(evaluation)]
    matrix = forgetting(evaluation)
    if matrix is not None:
        parts += [
            Text(),
            _title("Every model on every domain, %", "temperature 1; own domain bold"),
            FirstFit(choices=[_matrix(matrix, numbered=False), _matrix(matrix, numbered=True)]),
        ]
    return Group(*parts)


def _title(title: str, remark: str) -> Text:
    return Text.assemble((title, "bold"), "  ", (remark, "dim"))


def _scores(evaluation: Evaluation, digits: int) -> Table:
    """Two rows per domain, at temperature 1 and greedy; `digits` decimals in the intervals."""
    taught = has_teachers(evaluation)
    models = MODELS if taught else ("init", "student")
    easy = constant_domains(evaluation)
    table = _table()
    # Least widths are of what a narrow terminal would else break inside: titles and intervals.
    table.add_column("domain", overflow="fold")
    for model in models:
        table.add_column(model, overflow="fold", min_width=7)
    if taught:
        table.add_column("recovery", overflow="fold", min_width=9)
    table.add_column("constant", justify="right", overflow="fold", min_width=8)
    for name, row in evaluation["domains"].items():
        for decoding in DECODINGS:
            cells = decoded(row, decoding)
            line = [_row_title(name, decoding)]
            line += [_accuracy(cells[model], digits) for model in models]
            line += [_recovery(cells["recovery"])] if taught else []
            if decoding == DECODINGS[0]:
                baseline = percent(row["constant"]["value"])
                line.append(Text(baseline, style="yellow" if name in easy else ""))
            table.add_row(*line)
    if any(decoded(evaluation, decoding)["norm"] is not None for decoding in DECODINGS):
        table.add_section()
        for label in ("Norm (mean)", "minimum"):
            for decoding in DECODINGS:
                table.add_row(*_norm_row(evaluation, label, decoding))
    return table


def _row_title(name: str, decoding: str) -> Text:
    """The first row of a pair bears the name and is the one at temperature 1."""
    return Text(name, "bold") if decoding == DECODINGS[0] else Text(f"  {decoding}", "dim")


def _cell(value: str, interval: str = "", style: str = "") -> Text:
    """A value and its interval; values of a column stand under each other. A column that is too
    narrow breaks the line between the two."""
    return Text.assemble((value.rjust(5), style), (f" {interval}" if interval else "", "dim"))


def _accuracy(value: Mapping[str, float] | None, digits: int) -> Text:
    if value is None:
        return _cell(DASH)
    return _cell(percent(value["value"]), percent_range(value, digits))


def _recovery(value: Mapping[str, float] | None) -> Text:
    if value is None:
        return _cell(DASH)
    return _cell(fixed(value["value"], 2), ratio_range(value["low"], value["high"]), "bold")


def _norm_row(evaluation: Evaluation, label: str, decoding: str) -> list[Text]:
    """Norm with its interval, or the lowest recovery, in the column of recoveries."""
    found = decoded(evaluation, decoding)
    cell, over = _cell(DASH), ""
    if found["norm"] is not None and label == "minimum":
        cell = _cell(fixed(found["min_recovery"], 2), style="bold")
    elif found["norm"] is not None:
        interval = ratio_range(found["norm_low"], found["norm_high"])
        cell = _cell(fixed(found["norm"], 2), interval, "bold")
        over = norm_coverage(evaluation, decoding)
    said = Text(f"over {over}" if over else "", "yellow")
    return [_row_title(label, decoding), said, Text(), Text(), cell]


def _matrix(matrix: Forgetting, *, numbered: bool) -> Table:
    """`numbered` calls the domains 1, 2, ... in the header, for narrow terminals."""
    keys = [str(number + 1) for number in range(len(matrix.domains))]
    table = _table()
    table.add_column("model", overflow="fold")
    for title in keys if numbered else matrix.domains:
        table.add_column(title, justify="right", overflow="fold")
    for name, cells in matrix.rows.items():
        plain = matrix.roles[name] == "init"
        line = [Text(name, style="dim" if plain else "")]
        line += [
            Text(percent(cell.value), style="bold green" if cell.own else "dim" if plain else "")
            for cell in cells
        ]
        table.add_row(*line, end_section=plain)
    if numbered:
        legend = zip(keys, matrix.domains, strict=True)
        table.caption = " · ".join(f"{key} {domain}" for key, domain in legend)
        table.caption_justify = "left"
    return table


def _table() -> Table:
    """Where a column does not fit its cells are folded, never cut."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
