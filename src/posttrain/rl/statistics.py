"""Accuracy, recovery and their intervals, from per-problem scores.

recovery = (student - init) / (teacher - init), per domain; Norm = its mean over domains (MOPD,
arXiv 2606.30406, section on metrics). Intervals are 95 % percentile bootstraps over problems; all
models are resampled on the same problems, since they answered the same ones (paired). Where the
interval of teacher - init holds 0 the two cannot be told apart, and where it lies below 0 the
teacher is worse: either way recovery is not given, and Norm is the mean over the other domains.
Several students are compared in pairs, by the difference of their scores on the same problems.

Legend: S resamples, P problems, M models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Value = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One model's scores in one domain, one number in [0, 1] per problem."""

    sampled: Array
    """Mean over the responses at temperature 1, [P]."""
    greedy: Array
    """Of the greedy response, [P]."""


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
    domains: dict[str, dict[str, Any]] = {}
    recovery_DS: dict[str, list[Array]] = {"sampled": [], "greedy": []}
    gain_DS: dict[str, list[Array]] = {"sampled": [], "greedy": []}
    for number, name in enumerate(scores["student"]):
        teacher = f"teachers.{routes[name]}" if name in routes else None
        columns = {model: scores[model][name] for model in ("init", "student") if model in scores}
        if teacher:
            columns["teacher"] = scores[teacher][name]
        weight_SP = _resample(len(columns["student"].sampled), resamples, [seed, number])
        row: dict[str, Any] = {"num_problems": int(weight_SP.shape[1])}
        for decoding, kept in recovery_DS.items():
            values = {model: getattr(column, decoding) for model, column in columns.items()}
            table, recovered_S = _domain(values, weight_SP)
            table["gain"] = None
            if "init" in values:
                # [S, P] @ [P] -> [S].
                gain_S = weight_SP @ (values["student"] - values["init"])
                gain = float(np.mean(values["student"] - values["init"]))
                table["gain"] = _interval(gain, gain_S)
                gain_DS[decoding].append(gain_S)
            if recovered_S is not None:
                kept.append(recovered_S)
            row |= table if decoding == "sampled" else {"greedy": table}
        domains[name] = row | {"constant": dict(constants[name])}
    result: dict[str, Any] = {"domains": domains, "routes": dict(routes)}
    sampled = list(domains.values())
    greedy = [row["greedy"] for row in sampled]
    result |= _norm(sampled, recovery_DS["sampled"])
    result["greedy"] = _norm(greedy, recovery_DS["greedy"])
    result["gain"] = _mean_gain(sampled, gain_DS["sampled"])
    result["greedy"]["gain"] = _mean_gain(greedy, gain_DS["greedy"])
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


def _intervals(
    by_domain: Mapping[str, Scores], *, resamples: int, seed: int
) -> dict[str, dict[str, Value]]:
    """Both accuracies of one model in every domain, on the resamples of `evaluation`."""
    found = {}
    for number, (name, column) in enumerate(by_domain.items()):
        weight_SP = _resample(len(column.sampled), resamples, [seed, number])
        found[name] = {
            decoding: _interval(float(score_P.mean()), weight_SP @ score_P)
            for decoding, score_P in vars(column).items()
        }
    return found


def _difference(
    first: Mapping[str, Scores], second: Mapping[str, Scores], *, resamples: int, seed: int
) -> dict[str, Any]:
    """First minus second on the same problems: in every domain, and `all`, the mean over domains
    (None without a domain); each with `greedy` beside it."""
    difference_D = {
        name: {
            decoding: getattr(first[name], decoding) - getattr(second[name], decoding)
            for decoding in ("sampled", "greedy")
        }
        for name in first
    }
    domains: dict[str, Any] = {}
    total_DS: dict[str, list[Array]] = {"sampled": [], "greedy": []}
    for number, (name, of_domain) in enumerate(difference_D.items()):
        weight_SP = _resample(len(of_domain["sampled"]), resamples, [seed, number])
        found = {}
        for decoding, difference_P in of_domain.items():
            total_DS[decoding].append(weight_SP @ difference_P)
            found[decoding] = _interval(float(difference_P.mean()), total_DS[decoding][-1])
        domains[name] = found["sampled"] | {"greedy": found["greedy"]}
    if not domains:
        return {"domains": domains, "all": None}
    means = {
        decoding: _interval(
            float(np.mean([of_domain[decoding].mean() for of_domain in difference_D.values()])),
            np.mean(of_DS, axis=0),
        )
        for decoding, of_DS in total_DS.items()
    }
    return {"domains": domains, "all": means["sampled"] | {"greedy": means["greedy"]}}


def mean_interval(scores: Sequence[Array], *, resamples: int, seed: int) -> dict[str, float]:
    """The mean over domains of their means, `value`, with its interval, `low` to `high`.

    `scores` has one array [P] per domain. Equal numbers of problems draw the same resamples.
    """
    value_S = np.zeros(resamples)
    for number, score_P in enumerate(scores):
        value_S += _resample(len(score_P), resamples, [seed, number]) @ score_P / len(scores)
    return _interval(float(np.mean([score_P.mean() for score_P in scores])), value_S)


def ratio_interval(total_P: Array, count_P: Array, *, resamples: int, seed: int) -> Value:
    """Sum over sum, such as of log-ratios over tokens, with the interval over problems."""
    weight_SP = _resample(len(total_P), resamples, [seed, 0])
    value = float(total_P.sum() / count_P.sum())
    return _interval(value, (weight_SP @ total_P) / (weight_SP @ count_P))


def wins(score_P: Array, other_P: Array) -> Array:
    """1 where the first score of a problem is higher than the second, 0 where it is lower, 0.5
    for equal ones."""
    return (np.sign(score_P - other_P) + 1) / 2


def _domain(columns: Mapping[str, Array], weight_SP: Array) -> tuple[dict[str, Any], Array | None]:
    """One domain under one decoding, and the resampled recoveries where there is a recovery."""
    mean_S = {model: weight_SP @ column for model, column in columns.items()}
    table: dict[str, Any] = {
        model: _interval(float(column.mean()), mean_S[model]) for model, column in columns.items()
    }
    table |= {"teacher": table.get("teacher"), "recovery": None, "note": None}
    if "init" not in columns or "teacher" not in columns:
        table |= {"init": table.get("init")}
        table["note"] = "no teacher" if "init" in columns else "no init"
        return table, None
    gain = float(columns["teacher"].mean() - columns["init"].mean())
    gain_S = mean_S["teacher"] - mean_S["init"]
    table["teacher_gain"] = _interval(gain, gain_S)
    if table["teacher_gain"]["low"] <= 0:
        worse = table["teacher_gain"]["high"] < 0
        table["note"] = (
            "teacher is worse than init" if worse else "teacher and init cannot be told apart"
        )
        return table, None
    recovered = float(columns["student"].mean() - columns["init"].mean()) / gain
    # A resample in which the gain happens to vanish has no recovery.
    ratio_S = np.where(
        gain_S > 0, (mean_S["student"] - mean_S["init"]) / np.maximum(gain_S, 1e-12), np.nan
    )
    table["recovery"] = _interval(recovered, ratio_S)
    return table, ratio_S


def _norm(rows: Sequence[Mapping[str, Any]], ratio_DS: list[Array]) -> dict[str, Any]:
    """Norm, its interval and the lowest recovery; `norm_domains` counts the domains in it."""
    values = [row["recovery"]["value"] for row in rows if row["recovery"]]
    if not values:
        nothing = dict.fromkeys(("norm", "norm_low", "norm_high", "min_recovery"))
        return nothing | {"norm_domains": 0}
    # [D, S] -> [S] over domains. A resample without a recovery in one of them stays NaN, and the
    # interval leaves it out.
    norm = _interval(float(np.mean(values)), np.mean(ratio_DS, axis=0))
    return {
        "norm": norm["value"],
        "norm_low": norm["low"],
        "norm_high": norm["high"],
        "min_recovery": min(values),
        "norm_domains": len(values),
    }


def _mean_gain(rows: Sequence[Mapping[str, Any]], gain_DS: list[Array]) -> Value | None:
    """What the student gained on the init, mean over domains; None where there is nothing to
    compare."""
    if not gain_DS:
        return None
    return _interval(
        float(np.mean([row["gain"]["value"] for row in rows])), np.mean(gain_DS, axis=0)
    )


def _resample(num_problems: int, resamples: int, seed: list[int]) -> Array:
    """`weight_SP`: how often each problem is drawn in each resample, over the number drawn."""
    generator = np.random.default_rng(seed)
    equal = np.full(num_problems, 1 / num_problems)
    return generator.multinomial(num_problems, equal, size=resamples) / num_problems


def _interval(value: float, value_S: Array) -> Value:
    low, high = np.nanpercentile(value_S, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}
