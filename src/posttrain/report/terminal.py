"""The tables of an evaluation in the terminal.

A table is built in several densities; what is drawn is the first that fits the width at hand, so
nothing is ever cut off with an ellipsis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posttrain.report.scores import (
    DECODINGS,
    Evaluation,
    Forgetting,
    constant_domains,
    decoded,
    forgetting,
    has_teachers,
    norm_coverage,
    norms,
    notes,
    verdict,
)
from posttrain.report.wording import DASH, fixed, percent, percent_range, ratio_range

_UNBOUNDED = 1000
"""Columns that no table here fills."""


@dataclass(frozen=True, kw_only=True)
class FirstFit:
    """Draws the first of its choices that fits the width, the last one if none does."""

    choices: Sequence[RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.update(width=_UNBOUNDED)
        for choice in self.choices:
            if Measurement.get(console, free, choice).maximum <= options.max_width:
                yield choice
                return
        yield self.choices[-1]


@dataclass(frozen=True, kw_only=True)
class Density:
    """How the intervals of the score table are written."""

    digits: int = 1
    """Decimals of their bounds."""
    stacked: bool = False
    """Under the value, not beside it."""
    intervals: bool = True


DENSITIES = (
    Density(),
    Density(digits=0),
    Density(stacked=True),
    Density(digits=0, stacked=True),
    Density(intervals=False),
)


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """Accuracies with intervals and recovery per domain, then what each teacher forgot.

    `evaluation` is the content of evaluation.json.
    """
    split = {"heldout": "held-out"}.get(evaluation["split"], evaluation["split"])
    parts: list[RenderableType] = [
        _title(f"Accuracy on {split} problems, %", "95 % bootstrap intervals"),
        FirstFit(choices=[_scores(evaluation, density) for density in DENSITIES]),
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


def _scores(evaluation: Evaluation, density: Density) -> Table:
    taught = has_teachers(evaluation)
    easy = constant_domains(evaluation)
    rows = [
        (name, decoding, decoded(row, decoding))
        for name, row in evaluation["domains"].items()
        for decoding in DECODINGS
    ]
    table = _table()
    table.add_column("domain", overflow="fold")
    columns = []
    for model in ("init", "teacher", "student") if taught else ("init", "student"):
        cells = [_accuracy(row[model], density) for *_, row in rows]
        columns.append(_column(table, model, cells, density))
    if taught:
        cells = [_recovery(row["recovery"]) for *_, row in rows] + _norms(evaluation)
        columns.append(_column(table, "recovery", cells, density, style="bold"))
    table.add_column("constant", justify="right", overflow="fold")
    for number, (name, decoding, _) in enumerate(rows):
        line = [_row_title(name, decoding), *(column[number] for column in columns)]
        if decoding == DECODINGS[0]:
            baseline = percent(evaluation["domains"][name]["constant"]["value"])
            line.append(Text(baseline, style="yellow" if name in easy else ""))
        table.add_row(*line, end_section=density.stacked and decoding == DECODINGS[-1])
    if any(norms(evaluation, decoding)["norm"] is not None for decoding in DECODINGS):
        table.add_section()
        titles = [(label, d) for label in ("Norm (mean)", "minimum") for d in DECODINGS]
        for number, (label, decoding) in enumerate(titles):
            cell = columns[-1][len(rows) + number]
            title = _row_title(label, decoding)
            if label != "minimum" and (coverage := norm_coverage(evaluation, decoding)):
                title.append(f" {coverage}", "yellow")
            table.add_row(title, "", "", "", cell)
    return table


def _row_title(name: str, decoding: str) -> Text:
    """The first row of a pair bears the name and is the one at temperature 1."""
    return Text(name, "bold") if decoding == DECODINGS[0] else Text(f"  {decoding}", "dim")


Cell = tuple[str, str] | None
"""A value and its interval as text."""


def _accuracy(value: Mapping[str, float] | None, density: Density) -> Cell:
    if value is None:
        return None
    return percent(value["value"]), percent_range(value, density.digits)


def _recovery(value: Mapping[str, float] | None) -> Cell:
    if value is None:
        return None
    return fixed(value["value"], 2), ratio_range(value["low"], value["high"])


def _norms(evaluation: Evaluation) -> list[Cell]:
    """Norm and then the minimum, each under both decodings."""
    means: list[Cell] = []
    minima: list[Cell] = []
    for decoding in DECODINGS:
        found = norms(evaluation, decoding)
        if found["norm"] is None:
            means, minima = [*means, None], [*minima, None]
            continue
        interval = ratio_range(found["norm_low"], found["norm_high"])
        means.append((fixed(found["norm"], 2), interval))
        minima.append((fixed(found["min_recovery"], 2), ""))
    return means + minima


def _column(
    table: Table, title: str, cells: Sequence[Cell], density: Density, style: str = ""
) -> list[Text]:
    """Add a column whose values stand under each other, whatever the length of their intervals."""
    given = [cell for cell in cells if cell] or [(DASH, "")]
    value_width = max(len(value) for value, _ in given)
    width = max(len(interval) for _, interval in given) if density.intervals else 0
    if density.stacked:
        value_width = max(value_width, width)
    inline = density.intervals and not density.stacked
    total = max(len(title), value_width + (1 + width if inline else 0))
    texts = []
    for value, interval in (cell or (DASH, "") for cell in cells):
        text = Text(value.rjust(total - (1 + width if inline else 0)), style)
        if inline:
            text.append(f" {interval}", style="dim")
        elif density.stacked and interval:
            text.append(f"\n{interval.rjust(total)}", style="dim")
        texts.append(text)
    table.add_column(title.rjust(total), overflow="fold")
    return texts


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
