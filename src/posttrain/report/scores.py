"""What the tables of an evaluation show, as plain rows: shared by terminal, page and model card.

Everything is read from the dictionary that `statistics.evaluation` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.report.wording import percent, signed

MODELS = ("init", "teacher", "student")
DECODINGS = ("sampled", "greedy")
DECODING_NAMES = {"sampled": "temperature 1", "greedy": "greedy"}
MARGIN = 0.2
"""A constant answer this close to a teacher makes the domain's scores say little."""

Evaluation = Mapping[str, Any]


def decoded(table: Mapping[str, Any], decoding: str) -> Mapping[str, Any]:
    """What an evaluation says under one decoding: of one of its domains the accuracies, recovery
    and note; of itself norm, norm_low, norm_high, min_recovery (None where there is none) and
    norm_domains."""
    found: Mapping[str, Any] = table if decoding == "sampled" else table["greedy"]
    return found


def norm_coverage(evaluation: Evaluation, decoding: str) -> str:
    """How many domains Norm averages, such as "3 of 4"; empty where it is all of them.

    Also empty for an evaluation from before `norm_domains` was kept.
    """
    total = len(evaluation["domains"])
    counted = decoded(evaluation, decoding).get("norm_domains", total)
    return f"{counted} of {total}" if 0 < counted < total else ""


def weakest(evaluation: Evaluation) -> str | None:
    """The domain with the lowest recovery at temperature 1."""
    found = {
        name: row["recovery"]["value"]
        for name, row in evaluation["domains"].items()
        if row["recovery"]
    }
    return min(found, key=lambda name: found[name], default=None)


def split_name(evaluation: Evaluation) -> str:
    """What people call the part of the problems that was asked: "held-out", "validation"."""
    return split_words(str(evaluation["split"]))


def split_words(split: str) -> str:
    """The setting `split` as people say it."""
    return "held-out" if split == "heldout" else split


def has_teachers(evaluation: Evaluation) -> bool:
    """Whether any domain has a teacher, hence whether there is anything to recover."""
    return bool(evaluation["routes"])


def all_routes(evaluation: Evaluation) -> dict[str, str]:
    """Domain to its teacher's name, domains without a verifier included."""
    unverified = evaluation.get("unverified", {})
    taught = {n: row["teacher"] for n, row in unverified.items() if row["teacher"] is not None}
    return {**evaluation["routes"], **taught}


def notes(evaluation: Evaluation) -> list[str]:
    """Why a recovery is missing, and which domains a constant answer nearly solves."""
    found: list[str] = []
    if not has_teachers(evaluation):
        return found
    for name, row in evaluation["domains"].items():
        if row["init"] is None:
            # There is no recovery anywhere, and nobody expects one.
            continue
        reasons = {decoding: decoded(row, decoding)["note"] for decoding in DECODINGS}
        if reasons["sampled"] == reasons["greedy"]:
            reasons.pop("greedy")
            if reasons["sampled"]:
                found.append(f"{name}: no recovery, {reasons['sampled']}")
            continue
        found += [
            f"{name} ({DECODING_NAMES[decoding]}): no recovery, {reason}"
            for decoding, reason in reasons.items()
            if reason
        ]
    for name in constant_domains(evaluation):
        row = evaluation["domains"][name]
        found.append(
            f"{name}: always answering {shorten(row['constant']['response'])!r} scores "
            f"{percent(row['constant']['value'])}, within {100 * MARGIN:.0f} points of the teacher "
            f"({percent(row['teacher']['value'])})"
        )
    return found


def verdict(
    evaluation: Evaluation, who: str = "The student", everywhere: str = "over all domains"
) -> str:
    """Whether the student beats the init, said plainly; empty without an init, and for an
    evaluation from before `gain` was kept. `everywhere` is what several domains are called."""
    if evaluation.get("gain") is None:
        return ""
    gain = evaluation["gain"]
    points = f"{signed(gain['value'])} points, {signed(gain['low'])} to {signed(gain['high'])}"
    over = everywhere if len(evaluation["domains"]) > 1 else "in its domain"
    worse = [n for n, row in evaluation["domains"].items() if row["gain"]["high"] < 0]
    but = f"; it is worse in {', '.join(worse)}" if worse else ""
    if gain["low"] > 0:
        return f"{who} beats the init at temperature 1: {points} {over}{but}."
    if gain["high"] < 0:
        return f"{who} does NOT beat the init at temperature 1, it is worse: {points} {over}."
    return (
        f"{who} does NOT beat the init at temperature 1, the two cannot be told apart: "
        f"{points} {over}{but}."
    )


def constant_domains(evaluation: Evaluation) -> list[str]:
    """Domains in which the best constant answer comes within `MARGIN` of the teacher."""
    return [
        name
        for name, row in evaluation["domains"].items()
        if row["teacher"] and row["constant"]["value"] > row["teacher"]["value"] - MARGIN
    ]


def shorten(text: str, limit: int = 24) -> str:
    """The first line of a text, cut to `limit` characters."""
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= limit else line[: limit - 1] + "…"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model's accuracy in one domain."""

    value: float
    change: float
    """Difference to the init in the same domain."""
    own: bool
    """Whether the model is that domain's teacher."""


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Every model on every domain: what a specialist gains on its own and loses on the others."""

    domains: list[str]
    rows: dict[str, list[Cell]]
    """Model, as people call it, to one cell per domain: init, the teachers, students."""
    roles: dict[str, str]
    """Model, as people call it, to "init", "along", "teacher" or "student"."""


def forgetting(evaluation: Evaluation, decoding: str = "sampled") -> Forgetting | None:
    """The matrix of all models and domains; None without teachers."""
    routes = evaluation["routes"]
    # In the order of their domains, so that what they gained stands on the diagonal.
    teachers = list(dict.fromkeys(routes[n] for n in evaluation["domains"] if n in routes))
    if not teachers:
        return None
    models = {"init": ("init", "init")}
    models |= {name: (f"teachers.{name}", "teacher") for name in teachers}
    return matrix(evaluation, models | {"student": ("student", "student")}, decoding)


def matrix(
    evaluation: Evaluation, models: Mapping[str, tuple[str, str]], decoding: str = "sampled"
) -> Forgetting:
    """The matrix of these models: what people call them -> edge and role."""
    means, routes = evaluation["models"], evaluation["routes"]
    domains = list(evaluation["domains"])
    rows = {
        name: [
            Cell(
                value=means[edge][domain][decoding],
                change=means[edge][domain][decoding]
                - means.get("init", means[edge])[domain][decoding],
                own=edge == f"teachers.{routes.get(domain)}",
            )
            for domain in domains
        ]
        for name, (edge, _) in models.items()
    }
    roles = {name: role for name, (_, role) in models.items()}
    return Forgetting(domains=domains, rows=rows, roles=roles)


# -- as plain rows, for whoever keeps tables elsewhere ---------------------------------------------


def students_of(evaluation: Evaluation) -> dict[str, Evaluation]:
    """Student -> what is said of it; of one student with its init that is the evaluation itself."""
    found: dict[str, Evaluation] = evaluation.get("students") or {"student": evaluation}
    return found


def evaluation_rows(evaluation: Evaluation) -> list[tuple[str | float | None, ...]]:
    """(student, domain, model, decoding, accuracy, low, high) for each of `MODELS` that there is:
    shares in [0, 1] with 95 % intervals."""
    return [
        (student, domain, model, decoding, value["value"], value["low"], value["high"])
        for student, view in students_of(evaluation).items()
        for domain, row in view["domains"].items()
        for decoding in DECODINGS
        for model in MODELS
        if (value := decoded(row, decoding).get(model)) is not None
    ]


def recovery_rows(evaluation: Evaluation) -> list[tuple[str | float | None, ...]]:
    """(student, domain, decoding, recovery, low, high) where a recovery is known: the share of the
    way from init to teacher."""
    return [
        (student, domain, decoding, value["value"], value["low"], value["high"])
        for student, view in students_of(evaluation).items()
        for domain, row in view["domains"].items()
        for decoding in DECODINGS
        if (value := decoded(row, decoding).get("recovery")) is not None
    ]
