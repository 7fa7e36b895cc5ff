"""What the tables of an evaluation of several models show, as plain rows: shared by terminal, page
and model card.

Everything is read from the dictionary that `statistics.candidates` returns, with what the stage
adds: `unverified` and `judged`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.report.scores import DECODINGS, Evaluation, Forgetting, decoded, matrix, verdict
from posttrain.report.wording import MINUS

Value = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model of an evaluation."""

    title: str
    """What a table calls it: "init", "teacher", the name of a student."""
    role: str
    """init, along, teacher or student."""
    edge: str
    """Its edge of the evaluation; empty for "teacher", which is another model in each domain."""


def has_several(evaluation: Evaluation) -> bool:
    """Whether it has the form for several models, not that for one student with its init."""
    return "students" in evaluation


def views(evaluation: Evaluation) -> dict[str, Evaluation]:
    """Of each student what an evaluation of it alone would say, in the form of one student."""
    if not has_several(evaluation):
        return {"student": evaluation}
    shared = {key: evaluation[key] for key in ("routes", "split", "samples", "models")}
    return {
        name: view
        | shared
        | {"models": shared["models"] | {"student": shared["models"][edge_of(evaluation, name)]}}
        for name, view in evaluation["students"].items()
    }


def edge_of(evaluation: Evaluation, student: str) -> str:
    """The edge of a student: `student` of the only one, else `students.NAME`."""
    return student if student in evaluation["models"] else f"students.{student}"


def first_view(evaluation: Evaluation) -> Evaluation:
    """That of the first student: what it says of domains, init and teachers holds for all."""
    return next(iter(views(evaluation).values()))


def view_of(evaluation: Evaluation, edge: str) -> tuple[Evaluation, str]:
    """The evaluation of one student that tells of the model at this edge, and its key there."""
    for name, view in views(evaluation).items():
        if edge == edge_of(evaluation, name):
            return view, "student"
    view, found = first_view(evaluation), evaluation.get("along", {}).get(edge.partition(".")[2])
    if not edge.startswith("along.") or found is None:
        return view, edge
    rows = {
        name: row
        | {edge: found[name]["sampled"]}
        | {"greedy": row["greedy"] | {edge: found[name]["greedy"]}}
        for name, row in view["domains"].items()
    }
    return {**view, "domains": rows}, edge


def has_init(evaluation: Evaluation) -> bool:
    """Whether there is an init, hence gains."""
    return "init" in evaluation["models"]


def recovers(evaluation: Evaluation) -> bool:
    """Whether there can be recoveries in a verified domain."""
    return has_init(evaluation) and any(
        row["teacher"] for row in first_view(evaluation)["domains"].values()
    )


def columns(evaluation: Evaluation) -> list[Column]:
    """The models of a table of accuracies, from init to the students."""
    found = [Column(title="init", role="init", edge="init")] if has_init(evaluation) else []
    found += [
        Column(title=name, role="along", edge=f"along.{name}") for name in evaluation["along"]
    ]
    rows = first_view(evaluation)["domains"].values()
    if any(row["teacher"] for row in rows):
        found.append(Column(title="teacher", role="teacher", edge=""))
    return found + [
        Column(title=name, role="student", edge=edge_of(evaluation, name))
        for name in evaluation["students"]
    ]


def models(evaluation: Evaluation) -> list[Column]:
    """All models, each teacher by its name; a name that occurs before has its role beside it."""
    found = [column for column in columns(evaluation) if column.role != "teacher"]
    place = next(i for i, column in enumerate(found) if column.role == "student")
    taken = {column.title for column in found}
    routes, known = evaluation["routes"], evaluation["models"]
    # In the order of their domains, so that what they gained stands on the diagonal.
    wanted = dict.fromkeys(f"teachers.{routes[n]}" for n in routes)
    edges = [edge for edge in (*wanted, *known) if edge.startswith("teachers.")]
    teachers = []
    for edge in dict.fromkeys(edges):
        name = edge.partition(".")[2]
        title = f"{name} (teacher)" if name in taken else name
        teachers.append(Column(title=title, role="teacher", edge=edge))
    return found[:place] + teachers + found[place:]


def accuracy(evaluation: Evaluation, column: Column, domain: str, decoding: str) -> Value | None:
    """The accuracy of a column's model with its interval; None where it has none."""
    if column.role == "along":
        found: Value = evaluation["along"][column.title][domain][decoding]
        return found
    view = first_view(evaluation)
    if column.role == "student":
        view = evaluation["students"][column.title]
    key = column.role
    value: Value | None = decoded(view["domains"][domain], decoding)[key]
    return value


def recovery(evaluation: Evaluation, student: str, domain: str, decoding: str) -> Value | None:
    """What a student recovered of the teacher's gain."""
    found: Value | None = decoded(evaluation["students"][student]["domains"][domain], decoding)[
        "recovery"
    ]
    return found


def norm(evaluation: Evaluation, student: str, decoding: str) -> Value | None:
    """A student's Norm with its interval; None where it has none."""
    found = decoded(evaluation["students"][student], decoding)
    if found["norm"] is None:
        return None
    return {"value": found["norm"], "low": found["norm_low"], "high": found["norm_high"]}


def verdicts(evaluation: Evaluation) -> list[tuple[str, bool]]:
    """For each student whether it beats the init, said plainly, and whether it does."""
    found = []
    for name, view in views(evaluation).items():
        who = "The student" if name == "student" else name
        said = verdict(view, who, f"over {all_domains(evaluation)}")
        if said:
            found.append((said, view["gain"]["low"] > 0))
    return found


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First student minus second on the same problems."""

    first: str
    second: str
    cells: Mapping[str, Mapping[str, Value]]
    """Each domain, and before them the mean over all -> decoding -> difference."""

    @property
    def title(self) -> str:
        """As people read it."""
        return f"{self.first} {MINUS} {self.second}"


def all_domains(evaluation: Evaluation) -> str:
    """What the domains with accuracies are called together."""
    return "all verified domains" if evaluation.get("unverified") else "all domains"


def differences(evaluation: Evaluation) -> list[Difference]:
    """Every pair of students; with one domain without the mean over domains."""
    found = []
    for pair in evaluation["pairs"]:
        cells = dict(pair["domains"])
        if len(cells) > 1:
            cells = {all_domains(evaluation): pair["all"]} | cells
        if cells:
            both = {n: {d: decoded(cell, d) for d in DECODINGS} for n, cell in cells.items()}
            found.append(Difference(first=pair["first"], second=pair["second"], cells=both))
    return found


def told_apart(value: Value) -> bool:
    """Whether an interval of a difference leaves out 0."""
    return value["low"] > 0 or value["high"] < 0


def forgetting(evaluation: Evaluation) -> Forgetting | None:
    """The matrix of all models on all verified domains; None where the table of accuracies has
    it all: without teachers."""
    view = first_view(evaluation)
    if not view["domains"] or not any(c.role == "teacher" for c in models(evaluation)):
        return None
    named = {column.title: (column.edge, column.role) for column in models(evaluation)}
    whole = {"domains": view["domains"], "routes": evaluation["routes"]}
    return matrix(whole | {"models": evaluation["models"]}, named)


def any_of(rows: Mapping[str, Any], key: str) -> bool:
    """Whether a model has this in one of the domains."""
    return any(cells[key] for row in rows.values() for cells in row["models"].values())


def decimals(rows: Mapping[str, Any], key: str) -> int:
    """So many that the models' values of `key` in these domains can be told apart."""
    cells = [c for row in rows.values() for m in row["models"].values() for c in (m, *_more(m))]
    values = [cell[key]["value"] for cell in cells if cell.get(key)]
    spread = max(values, default=0.0) - min(values, default=0.0)
    return 2 if spread == 0 else min(6, max(0, 1 - math.floor(math.log10(spread))))


def _more(cells: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cells["greedy"]] if "greedy" in cells else []


def mean_accuracy(view: Evaluation) -> float:
    """Of a student at temperature 1, the mean over its verified domains."""
    values = [row["student"]["value"] for row in view["domains"].values()]
    return float(sum(values) / len(values))


def judge_name(row: Mapping[str, Any]) -> str:
    """How people call the judge of a domain."""
    return ", ".join(dict.fromkeys(row["judge"]))


def sizes(evaluation: Evaluation) -> str:
    """How many problems a verified domain has: "400", or "120 to 400"."""
    counts = [row["num_problems"] for row in first_view(evaluation)["domains"].values()]
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
