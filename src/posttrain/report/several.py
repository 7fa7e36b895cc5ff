"""The tables of an evaluation of several models in the terminal: a column per student, and where
that does not fit, a row per model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from posttrain.report import candidates
from posttrain.report.candidates import Column
from posttrain.report.roles import explained
from posttrain.report.scores import (
    DECODING_NAMES,
    DECODINGS,
    Evaluation,
    constant_domains,
    decoded,
    norm_coverage,
    notes,
    split_name,
)
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
from posttrain.report.wording import DASH, between, fixed, percent, ratio_range, signed

KL_REMARK = "KL in nats per token on the model's own samples, length in tokens"


def candidates_table(evaluation: Evaluation, names: Mapping[str, str]) -> RenderableType:
    """All tables, one under the other; `names` are those of the stages by edge, if known."""
    parts: list[RenderableType] = [Text(line) for line in explained(evaluation, names)]
    if candidates.first_view(evaluation)["domains"]:
        parts += _verified(evaluation)
    if evaluation["unverified"]:
        tables = tuple(_unverified(evaluation, digits) for digits in (2, 1, None))
        parts += part("Domains without a verifier", KL_REMARK, *tables)
    if evaluation["judged"]:
        wide, narrow = (_judged(evaluation, digits) for digits in (1, 0))
        remark = "mean score, and % of problems won against init (ties half)"
        parts += part("What judges say", remark, wide, narrow)
    return Group(*parts)


def _verified(evaluation: Evaluation) -> list[RenderableType]:
    remark = "95 % intervals"
    choices = [_wide(evaluation, 1), _wide(evaluation, 0), _turned(evaluation)]
    parts = part(f"Accuracy on {split_name(evaluation)} problems, %", remark, *choices)
    for said, better in candidates.verdicts(evaluation):
        parts.append(line(said, "bold" if better else "bold yellow"))
    parts += [line(note, "yellow") for note in notes(candidates.first_view(evaluation))]
    if candidates.differences(evaluation):
        remark = "on the same problems, with intervals; bold where 0 is outside"
        tables = (_pairs(evaluation), _turned_pairs(evaluation))
        parts += part("Paired differences, points", remark, *tables)
    return parts + matrix_part(candidates.forgetting(evaluation))


def _wide(evaluation: Evaluation, digits: int) -> Table:
    """A column per model; under each domain the recovery of each student."""
    columns, view = candidates.columns(evaluation), candidates.first_view(evaluation)
    easy, table = constant_domains(view), plain_table()
    table.add_column("domain", overflow="fold")
    for column in columns:
        table.add_column(column.title, overflow="fold", min_width=7)
    table.add_column("constant", justify="right", overflow="fold", min_width=8)
    for name, row in view["domains"].items():
        for decoding in DECODINGS:
            cells = [row_title(name, decoding)]
            cells += [
                accuracy(candidates.accuracy(evaluation, column, name, decoding), digits)
                for column in columns
            ]
            if decoding == DECODINGS[0]:
                style = "yellow" if name in easy else ""
                cells.append(Text(percent(row["constant"]["value"]), style=style))
            table.add_row(*cells)
            if candidates.recovers(evaluation) and row["teacher"]:
                table.add_row(
                    Text("  recovery", "dim"),
                    *(_recovered(evaluation, column, name, decoding) for column in columns),
                )
    if any(
        candidates.norm(evaluation, name, d) for name in evaluation["students"] for d in DECODINGS
    ):
        table.add_section()
        for label in ("Norm (mean)", "minimum"):
            for decoding in DECODINGS:
                cells = [_norm(evaluation, column, label, decoding) for column in columns]
                # All students have the same teachers; the first column is that of init.
                over = norm_coverage(view, decoding) if label == "Norm (mean)" else ""
                cells[0] = Text(f"over {over}" if over else "", "yellow")
                table.add_row(row_title(label, decoding), *cells)
    return table


def _recovered(evaluation: Evaluation, column: Column, domain: str, decoding: str) -> Text:
    if column.role != "student":
        return Text()
    return recovery(candidates.recovery(evaluation, column.title, domain, decoding))


def _norm(evaluation: Evaluation, column: Column, label: str, decoding: str) -> Text:
    if column.role != "student":
        return Text()
    value = candidates.norm(evaluation, column.title, decoding)
    if value is None:
        return cell(DASH)
    view = evaluation["students"][column.title]
    if label == "minimum":
        return cell(fixed(decoded(view, decoding)["min_recovery"], 2), style="bold")
    return cell(fixed(value["value"], 2), ratio_range(value["low"], value["high"]), "bold")


def _turned(evaluation: Evaluation) -> Table:
    """A row per model, the domains one under the other: as narrow as a table can be."""
    columns, view = candidates.columns(evaluation), candidates.first_view(evaluation)
    table = plain_table()
    table.add_column("", overflow="fold", min_width=6)
    for decoding in DECODINGS:
        table.add_column(DECODING_NAMES[decoding], overflow="fold", min_width=9)
    for name, row in view["domains"].items():
        table.add_row(Text(name, "bold"))
        for column in columns:
            values = [candidates.accuracy(evaluation, column, name, d) for d in DECODINGS]
            table.add_row(Text(f"  {column.title}"), *(accuracy(value, 0) for value in values))
            if column.role == "student" and candidates.recovers(evaluation) and row["teacher"]:
                cells = (_recovered(evaluation, column, name, d) for d in DECODINGS)
                table.add_row(Text("    recovery", "dim"), *cells)
        table.add_row(Text("  constant"), cell(percent(row["constant"]["value"])), end_section=True)
    for label in ("Norm (mean)", "minimum"):
        if not any(candidates.norm(evaluation, name, "sampled") for name in evaluation["students"]):
            continue
        over = [norm_coverage(view, d) if label == "Norm (mean)" else "" for d in DECODINGS]
        table.add_row(
            Text(label, "bold"), *(Text(f"over {n}" if n else "", "yellow") for n in over)
        )
        for column in columns:
            if column.role == "student":
                cells = (_norm(evaluation, column, label, d) for d in DECODINGS)
                table.add_row(Text(f"  {column.title}"), *cells)
    return table


def _difference(value: Mapping[str, float]) -> Text:
    style = "bold" if candidates.told_apart(value) else ""
    return cell(signed(value["value"]), between(value, 1, 100), style)


def _pairs(evaluation: Evaluation) -> Table:
    """A row per pair and decoding, a column per domain."""
    found, table = candidates.differences(evaluation), plain_table()
    table.add_column("", overflow="fold")
    for name in found[0].cells:
        table.add_column(name, overflow="fold", min_width=9)
    for pair in found:
        for decoding in DECODINGS:
            cells = (_difference(of_both[decoding]) for of_both in pair.cells.values())
            table.add_row(row_title(pair.title, decoding), *cells)
    return table


def _turned_pairs(evaluation: Evaluation) -> Table:
    """A row per domain, the pairs one under the other."""
    table = plain_table()
    table.add_column("", overflow="fold", min_width=6)
    for decoding in DECODINGS:
        table.add_column(DECODING_NAMES[decoding], overflow="fold", min_width=9)
    for pair in candidates.differences(evaluation):
        table.add_row(Text(pair.title, "bold"))
        for name, of_both in pair.cells.items():
            table.add_row(Text(f"  {name}"), *(_difference(of_both[d]) for d in DECODINGS))
    return table


def _unverified(evaluation: Evaluation, digits: int | None) -> Table:
    """A row per model, the domains one under the other; intervals have so many digits, or there
    are none."""
    rows = evaluation["unverified"]
    kls = {
        title: key
        for title, key in (("KL to init", "kl_init"), ("KL to teacher", "kl_teacher"))
        if candidates.any_of(rows, key)
    }
    table = plain_table()
    table.add_column("", overflow="fold", min_width=6)
    for name in (*kls, "length"):
        table.add_column(name, overflow="fold", min_width=7)
    table.add_column("cut, %", justify="right", overflow="fold")
    for domain, row in rows.items():
        table.add_row(Text(domain, "bold"))
        for column in candidates.models(evaluation):
            found = row["models"][column.edge]
            table.add_row(
                Text(f"  {column.title}"),
                *(_number(found[key], digits, 1) for key in kls.values()),
                _number(found["length"], digits, -1),
                Text(percent(found["truncated"])),
            )
    return table


def _judged(evaluation: Evaluation, digits: int) -> Table:
    """A row per model and decoding, the domains one under the other."""
    rows = evaluation["judged"]
    shown = {
        title: key
        for title, key in (("score", "score"), ("wins, %", "win"))
        if candidates.any_of(rows, key)
    }
    table = plain_table()
    table.add_column("", overflow="fold", min_width=6)
    for name in shown:
        table.add_column(name, overflow="fold", min_width=9)
    for domain, row in rows.items():
        table.add_row(Text.assemble((domain, "bold"), f" by {candidates.judge_name(row)}"))
        places = candidates.decimals({domain: row}, "score")
        for column in candidates.models(evaluation):
            for decoding in DECODINGS:
                found: Any = decoded(row["models"][column.edge], decoding)
                name = f"  {column.title}" if decoding == DECODINGS[0] else "    greedy"
                cells = [
                    accuracy(found[key], digits)
                    if key == "win" or row["unit"]
                    else _number(found[key], places, 0)
                    for key in shown.values()
                ]
                table.add_row(Text(name, "" if decoding == DECODINGS[0] else "dim"), *cells)
    return table


def _number(value: Mapping[str, float] | None, digits: int | None, more: int) -> Text:
    """A number and its interval with `digits` + `more` decimals; without the interval with 2 +
    `more`."""
    if value is None:
        return cell(DASH)
    places = max(0, (2 if digits is None else digits) + more)
    interval = "" if digits is None else between(value, places)
    return cell(fixed(value["value"], places), interval)
