"""`compare`: several artifacts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from posttrain.commands import io
from posttrain.commands.inspect import differences, side
from posttrain.commands.io import console, emit, plain_table
from posttrain.engine import ancestry
from posttrain.engine.errors import ConfigError
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.report.benchmarks import SideBySide, side_by_side, with_error
from posttrain.report.compare import (
    UNPAIRED,
    Side,
    sides_of_evaluations,
    sides_of_models,
    unpaired,
)
from posttrain.report.scores import split_words
from posttrain.report.wording import DASH, fixed, number, percent, percent_range, signed
from posttrain.stages.kinds import shown_kind


def compare(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT...", help="Two or more: name, name-fingerprint, or fingerprint."
        ),
    ],
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    """Show several artifacts side by side: where they differ, their metrics and scores."""
    place = Store(store)
    found = [place.resolve(text) for text in artifacts]
    if len(found) < 2:
        raise ConfigError("compare needs two artifacts or more; `posttrain ls` lists them")
    labels = [artifact.label for artifact in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{label} is given twice; give two different artifacts")
    rows = differing(place, found)
    keys = dict.fromkeys(key for artifact in found for key in artifact.metrics)
    metrics = {key: [artifact.metrics.get(key) for artifact in found] for key in keys}
    sides = _sides(place, found)
    models = all(shown_kind(artifact.kind).is_model() for artifact in found)
    benchmarks = side_by_side(place, found) if models else []
    if as_json:
        emit(
            {
                "artifacts": [
                    {"label": a.label, "name": a.name, "kind": a.kind, "fingerprint": a.fingerprint}
                    for a in found
                ],
                "differences": rows,
                "metrics": metrics,
                "scores": [_side_json(side) for side in sides],
                "benchmarks": [_benchmark_json(one) for one in benchmarks],
            }
        )
        return
    out = console()
    letters = {label: _letter(place) for place, label in enumerate(labels)}
    for artifact in found:
        letter = (letters[artifact.label], "bold")
        out.print(Text.assemble(letter, f"  {artifact.label}", (f"  {artifact.kind}", "dim")))
    out.print()
    _show_differences(out, labels, rows)
    table = plain_table("", *letters.values())
    for key, values in metrics.items():
        table.add_row(Text(key), *(number(value) for value in values))
    if metrics:
        out.print(Text("\nmetrics", "bold"))
        out.print(table)
    for one in sides:
        _show_side(out, one, letters)
    for table_of in benchmarks:
        _show_benchmarks(out, table_of, list(letters.values()))


def _letter(place: int) -> str:
    """What the tables call an artifact: A, B, ..., Z, A2, ..."""
    return chr(ord("A") + place % 26) + (str(place // 26 + 1) if place >= 26 else "")


def differing(store: Store, artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Every field in which an artifact, or an ancestor of it, differs from its counterpart of the
    first artifact, those of the earliest ancestors first.

    A row has the `stage` as the first artifact has it, the `path` of edges that leads there, the
    `field`, and a value per artifact.
    """
    first = artifacts[0]
    order = [ancestor.label for ancestor in ancestry.lineage(store, first)]
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for place, other in enumerate(artifacts[1:], 1):
        filled = set()
        for pair in differences(store, first, other):
            for entry in pair["fields"]:
                # One stage of the first may stand for several of another: those get their own rows.
                key: tuple[str, ...] = (pair["a"], entry["field"])
                key = (*key, pair["path"]) if key in filled else key
                filled.add(key)
                row = rows.setdefault(
                    key,
                    {
                        "stage": pair["a"],
                        "path": pair["path"],
                        "field": entry["field"],
                        "values": [entry["a"]] * len(artifacts),
                    },
                )
                row["values"][place] = entry["b"]
    return sorted(
        rows.values(),
        key=lambda row: order.index(row["stage"]) if row["stage"] in order else len(order),
    )


def _sides(store: Store, artifacts: Sequence[Artifact]) -> list[Side]:
    """Accuracies side by side: of evaluations, or of models by the evaluations in the store."""
    kinds = [shown_kind(artifact.kind) for artifact in artifacts]
    if all("scores" in kind.makes for kind in kinds):
        return sides_of_evaluations(artifacts)
    if all(kind.is_model() for kind in kinds):
        return sides_of_models(store, artifacts)
    return []


def _show_differences(out: Console, labels: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        out.print("the same settings, data and ancestors")
        return
    name = rows[0]["stage"]
    said = "themselves" if name == labels[0] else f"{name} ({rows[0]['path']})"
    out.print(Text(f"the first stage in which they differ: {said}", "bold"), soft_wrap=True)
    table = plain_table("stage", "field", *(_letter(place) for place in range(len(labels))))
    before = None
    for row in rows:
        place = (row["path"], row["stage"])
        shown = row["path"] or "itself"
        table.add_row(
            Text("" if place == before else shown, "bold"),
            Text(row["field"].removeprefix("config.")),
            *(Text(side(value)) for value in row["values"]),
        )
        before = place
    out.print(table)


def _show_side(out: Console, side: Side, letters: Mapping[str, str]) -> None:
    titles = [
        letters[column.artifact] + (f" {column.student}" if column.student else "")
        for column in side.columns
    ]
    out.print()
    out.print(Text(f"accuracy at temperature 1 on {split_words(side.split)} problems, %", "bold"))
    if len({column.artifact for column in side.columns}) == 1:
        out.print(Text("no other of them was evaluated on these problems", "yellow"))
    table = plain_table("domain", *titles)
    compared = False
    for domain in side.domains:
        cells = []
        for column in side.columns:
            value, reference = column.domains.get(domain), side.reference(column)
            if value is None:
                cells.append(Text(DASH))
                continue
            text = percent(value["value"])
            text += f"  {percent_range(value)}" if "low" in value else ""
            if reference is not None and domain in reference.domains:
                delta = unpaired(reference.domains[domain], value)
                text += f"\nΔ {signed(delta['value'])}"
                if "low" in delta:
                    text += f"  {signed(delta['low'])} to {signed(delta['high'])}"
                    compared = True
            cells.append(Text(text))
        table.add_row(Text(domain, "bold"), *cells)
    if any(column.norm is not None for column in side.columns):
        norms = [DASH if c.norm is None else fixed(c.norm, 2) for c in side.columns]
        table.add_row(Text("Norm", "bold"), *norms)
    out.print(table)
    if compared:
        first = letters[side.columns[0].artifact]
        out.print(Text(f"Δ: difference to {first}. {UNPAIRED}", "dim"), soft_wrap=True)


def _show_benchmarks(out: Console, one: SideBySide, letters: Sequence[str]) -> None:
    out.print(Text("\ntasks of lm-eval" + (f", {one.asked}" if one.asked else ""), "bold"))
    table = plain_table("task", "metric", *letters)
    before = None
    for task, metric, values in one.rows:
        cells = [DASH if value is None else with_error(value) for value in values]
        table.add_row(Text("" if task == before else task, "bold"), Text(metric), *cells)
        before = task
    out.print(table)


def _benchmark_json(one: SideBySide) -> dict[str, Any]:
    rows = [{"task": t, "metric": m, "values": list(values)} for t, m, values in one.rows]
    return {"asked": one.asked, "rows": rows}


def _side_json(side: Side) -> dict[str, Any]:
    columns = []
    for column in side.columns:
        reference = side.reference(column)
        known = {} if reference is None else reference.domains
        columns.append(
            {
                "artifact": column.artifact,
                "student": column.student,
                "evaluation": column.evaluation,
                "norm": column.norm,
                "domains": dict(column.domains),
                "differences": {
                    domain: unpaired(known[domain], value)
                    for domain, value in column.domains.items()
                    if domain in known
                },
            }
        )
    return {"split": side.split, "paired": False, "columns": columns}
