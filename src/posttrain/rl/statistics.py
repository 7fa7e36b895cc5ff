"""Accuracy, recovery and their intervals, from per-problem scores.

recovery = (student - init) / (teacher - init), per domain; Norm = its mean over domains (MOPD,
arXiv 2606.30406, section on metrics). Intervals are 95 % intervals over problems
(`posttrain.rl.intervals`); all models are resampled on the same problems, since they answered the
same ones (paired), and a problem with all modes in which it was asked. Where the interval of
teacher - init holds 0 the two cannot be told apart, and where it lies below 0 the teacher is worse:
either way recovery is not given, and Norm is the mean over the other domains. Several students are
compared in pairs, by the difference of their scores on the same problems.

A part of the results is a domain, or with modes `domain/mode`.

Legend: P problems.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from posttrain.rl.intervals import Array, Estimate, Measure, Resamples, Value, average, bootstrap

DECODINGS = ("sampled", "greedy")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One model's scores in one domain, one number in [0, 1] per problem."""

    sampled: Array
    """Mean over the responses at temperature 1, [P]."""
    greedy: Array
    """Of the greedy response, [P]."""
    problems: Sequence[Hashable] | None = None
    """What tells the problems apart; modes of one problem have the same. None numbers them."""


def evaluation(
    scores: Mapping[str, Mapping[str, Scores]],
    *,
    routes: Mapping[str, str],
    constants: Mapping[str, Mapping[str, Any]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that is reported, as plain data.

    `scores[model][domain]`, models being "student", "init" and "teachers.<name>"; `routes` maps a
    domain to its teacher's name. Domains without a route have no teacher and no recovery. Without
    an init there is no gain and no recovery.
    """
    drawn = resamples_of(scores["student"], resamples=resamples, seed=seed)
    domains: dict[str, dict[str, Any]] = {}
    recoveries: dict[str, list[Estimate]] = {decoding: [] for decoding in DECODINGS}
    gains: dict[str, dict[str, Array]] = {decoding: {} for decoding in DECODINGS}
    for name in scores["student"]:
        teacher = f"teachers.{routes[name]}" if name in routes else None
        columns = {model: scores[model][name] for model in ("init", "student") if model in scores}
        if teacher:
            columns["teacher"] = scores[teacher][name]
        row: dict[str, Any] = {"num_problems": len(columns["student"].sampled)}
        for decoding, kept in recoveries.items():
            values = {model: getattr(column, decoding) for model, column in columns.items()}
            table, recovered = _domain(name, values, drawn)
            table["gain"] = None
            if "init" in values:
                gains[decoding][name] = values["student"] - values["init"]
                table["gain"] = drawn.interval(name, gains[decoding][name], of="difference")
            if recovered is not None:
                kept.append(recovered)
            row |= table if decoding == "sampled" else {"greedy": table}
        domains[name] = row | {"constant": dict(constants[name])}
    result: dict[str, Any] = {"domains": domains, "routes": dict(routes)}
    result |= _norm(recoveries["sampled"])
    result["greedy"] = _norm(recoveries["greedy"])
    for decoding, table in (("sampled", result), ("greedy", result["greedy"])):
        # What the student gained on the init; nothing where there is nothing to compare.
        table["gain"] = (
            drawn.interval_of_means(gains[decoding], of="difference") if gains[decoding] else None
        )
    result["models"] = _means(scores)
    return result


def candidates(
    scores: Mapping[str, Mapping[str, Scores]],
    *,
    students: Mapping[str, str],
    along: Mapping[str, str],
    routes: Mapping[str, str],
    constants: Mapping[str, Mapping[str, Any]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """What is reported about several students, as plain data.

    `students` and `along` (models on the way to them) map names to keys of `scores`, which are
    else as in `evaluation`. Of each student there is what `evaluation` says of it alone, to the
    same bits; of each pair of students the difference, first minus second.
    """
    shared = {m: s for m, s in scores.items() if m == "init" or m.startswith("teachers.")}
    how: dict[str, Any] = {"resamples": resamples, "seed": seed}
    views: dict[str, dict[str, Any]] = {}
    for name, model in students.items():
        only = {"student": scores[model], **shared}
        view = evaluation(only, routes=routes, constants=constants, **how)
        views[name] = {key: view[key] for key in view if key not in ("models", "routes")}
    return {
        "students": views,
        "along": {name: _intervals(scores[model], **how) for name, model in along.items()},
        "pairs": [
            {"first": a, "second": b} | _difference(scores[students[a]], scores[students[b]], **how)
            for a, b in combinations(students, 2)
        ],
        "routes": dict(routes),
        "models": _means(scores),
    }


def _means(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, Any]:
    return {
        model: {
            name: {
                "sampled": float(column.sampled.mean()),
                "greedy": float(column.greedy.mean()),
            }
            for name, column in by_domain.items()
        }
        for model, by_domain in scores.items()
    }


def resamples_of(by_domain: Mapping[str, Scores], *, resamples: int, seed: int) -> Resamples:
    """The draws of the problems of all domains, the same for all models that answered them."""
    problems = {
        name: range(len(column.sampled)) if column.problems is None else column.problems
        for name, column in by_domain.items()
    }
    return Resamples(problems, resamples=resamples, seed=seed)


def _intervals(
    by_domain: Mapping[str, Scores], *, resamples: int, seed: int
) -> dict[str, dict[str, Value]]:
    """Both accuracies of one model in every domain, on the resamples of `evaluation`."""
    drawn = resamples_of(by_domain, resamples=resamples, seed=seed)
    return {
        name: {
            decoding: drawn.interval(name, getattr(column, decoding), of="score")
            for decoding in DECODINGS
        }
        for name, column in by_domain.items()
    }


def _difference(
    first: Mapping[str, Scores], second: Mapping[str, Scores], *, resamples: int, seed: int
) -> dict[str, Any]:
    """First minus second on the same problems: in every domain, and `all`, the mean over domains
    (None without a domain); each with `greedy` beside it."""
    drawn = resamples_of(first, resamples=resamples, seed=seed)
    differences = {
        decoding: {
            name: getattr(first[name], decoding) - getattr(second[name], decoding) for name in first
        }
        for decoding in DECODINGS
    }
    domains = {
        name: drawn.interval(name, differences["sampled"][name], of="difference")
        | {"greedy": drawn.interval(name, differences["greedy"][name], of="difference")}
        for name in first
    }
    if not domains:
        return {"domains": domains, "all": None}
    means = {
        decoding: drawn.interval_of_means(of_it, of="difference")
        for decoding, of_it in differences.items()
    }
    return {"domains": domains, "all": means["sampled"] | {"greedy": means["greedy"]}}


def mean_interval(
    scores: Mapping[str, Array],
    *,
    resamples: int,
    seed: int,
    problems: Mapping[str, Sequence[Hashable]] | None = None,
    of: Measure = "score",
) -> Value:
    """The mean over domains of their means, `value`, with its interval, `low` to `high`.

    `scores` has one array of rows per domain, `problems` the problem of each row, where a problem
    has several.
    """
    rows = {name: range(len(score_P)) for name, score_P in scores.items()}
    drawn = Resamples(rows if problems is None else problems, resamples=resamples, seed=seed)
    return drawn.interval_of_means(scores, of=of)


def ratio_interval(total_P: Array, count_P: Array, *, resamples: int, seed: int) -> Value:
    """Sum over sum, such as of log-ratios over tokens, with the interval over problems."""
    drawn = Resamples({"": range(len(total_P))}, resamples=resamples, seed=seed)
    return bootstrap(drawn.ratio("", total_P, count_P))


def wins(score_P: Array, other_P: Array) -> Array:
    """1 where the first score of a problem is higher than the second, 0 where it is lower, 0.5
    for equal ones."""
    return (np.sign(score_P - other_P) + 1) / 2


def _domain(
    name: str, columns: Mapping[str, Array], drawn: Resamples
) -> tuple[dict[str, Any], Estimate | None]:
    """One domain under one decoding, and its recovery where there is one."""
    table: dict[str, Any] = {
        model: drawn.interval(name, column, of="score") for model, column in columns.items()
    }
    table |= {"teacher": table.get("teacher"), "recovery": None, "note": None}
    if "init" not in columns or "teacher" not in columns:
        table |= {"init": table.get("init")}
        table["note"] = "no teacher" if "init" in columns else "no init"
        return table, None
    table["teacher_gain"] = drawn.interval(
        name, columns["teacher"] - columns["init"], of="difference"
    )
    if table["teacher_gain"]["low"] <= 0:
        worse = table["teacher_gain"]["high"] < 0
        table["note"] = (
            "teacher is worse than init" if worse else "teacher and init cannot be told apart"
        )
        return table, None
    init, student, teacher = (
        drawn.mean(name, columns[model]) for model in ("init", "student", "teacher")
    )
    recovered = (student - init).over(teacher - init)
    table["recovery"] = bootstrap(recovered)
    return table, recovered


def _norm(recovered: Sequence[Estimate]) -> dict[str, Any]:
    """Norm, its interval and the lowest recovery; `norm_domains` counts the domains in it."""
    if not recovered:
        nothing = dict.fromkeys(("norm", "norm_low", "norm_high", "min_recovery"))
        return nothing | {"norm_domains": 0}
    # A resample without a recovery in one of them stays NaN, and the interval leaves it out.
    norm = bootstrap(average(recovered))
    return {
        "norm": norm["value"],
        "norm_low": norm["low"],
        "norm_high": norm["high"],
        "min_recovery": min(estimate.value for estimate in recovered),
        "norm_domains": len(recovered),
    }
