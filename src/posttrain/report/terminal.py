"""The tables of an evaluation in the terminal.

Where a terminal is narrow, intervals lose their decimals and then stand under their values. Nothing
is ever cut off with an ellipsis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from posttrain.report.candidates import has_several
from posttrain.report.scores import (
    DECODINGS,
    MODELS,
    Evaluation,
    constant_domains,
    decoded,
    forgetting,
    has_teachers,
    norm_coverage,
    notes,
    split_name,
    verdict,
)
from posttrain.report.several import candidates_table
from posttrain.report.tables import (
    accuracy,
    cell,
    line,
    matrix_part,
    part,
    plain_table,
    recovery,
    row_title,
)
from posttrain.report.wording import DASH, fixed, percent, ratio_range


def warnings_list(warnings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Warnings, {"stage": name or None, "text": sentence} each, one under the other."""
    title = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    table = Table.grid(padding=(0, 2, 0, 0))
    for warning in warnings:
        table.add_row(Text(warning["stage"] or "recipe", "yellow"), Text(warning["text"]))
    return Group(Text(title, "bold yellow"), table)


def evaluation_table(
    evaluation: Evaluation, names: Mapping[str, str] | None = None
) -> RenderableType:
    """Accuracies with intervals and recovery per domain, then what each teacher forgot.

    `evaluation` is the content of evaluation.json; `names` are those of the stages by edge, where
    they are known.
    """
    if has_several(evaluation):
        return candidates_table(evaluation, names or {})
    # The first heading needs no empty line above it.
    _, *parts = part(
        f"Accuracy on {split_name(evaluation)} problems, %",
        "95 % intervals",
        *(_scores(evaluation, digits) for digits in (1, 0)),
    )
    if said := verdict(evaluation):
        parts.append(line(said, "bold" if evaluation["gain"]["low"] > 0 else "bold yellow"))
    parts += [line(note, "yellow") for note in notes(evaluation)]
    parts += matrix_part(forgetting(evaluation))
    return Group(*parts)


def _scores(evaluation: Evaluation, digits: int) -> Table:
    """Two rows per domain, at temperature 1 and greedy; `digits` decimals in the intervals."""
    taught = has_teachers(evaluation)
    models = MODELS if taught else ("init", "student")
    easy = constant_domains(evaluation)
    table = plain_table()
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
            row_cells = [row_title(name, decoding)]
            row_cells += [accuracy(cells[model], digits) for model in models]
            row_cells += [recovery(cells["recovery"])] if taught else []
            if decoding == DECODINGS[0]:
                baseline = percent(row["constant"]["value"])
                row_cells.append(Text(baseline, style="yellow" if name in easy else ""))
            table.add_row(*row_cells)
    if any(decoded(evaluation, decoding)["norm"] is not None for decoding in DECODINGS):
        table.add_section()
        for label in ("Norm (mean)", "minimum"):
            for decoding in DECODINGS:
                table.add_row(*_norm_row(evaluation, label, decoding))
    return table


def _norm_row(evaluation: Evaluation, label: str, decoding: str) -> list[Text]:
    """Norm with its interval, or the lowest recovery, in the column of recoveries."""
    found = decoded(evaluation, decoding)
    value, over = cell(DASH), ""
    if found["norm"] is not None and label == "minimum":
        value = cell(fixed(found["min_recovery"], 2), style="bold")
    elif found["norm"] is not None:
        interval = ratio_range(found["norm_low"], found["norm_high"])
        value = cell(fixed(found["norm"], 2), interval, "bold")
        over = norm_coverage(evaluation, decoding)
    said = Text(f"over {over}" if over else "", "yellow")
    return [row_title(label, decoding), said, Text(), Text(), value]
