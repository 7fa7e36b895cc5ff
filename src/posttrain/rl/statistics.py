"""Accuracy, recovery and their intervals, from per-problem scores.

recovery = (student - init) / (teacher - init), per domain; Norm = its mean over domains (MOPD,
arXiv 2606.30406, section on metrics). Intervals are 95 % percentile bootstraps over problems; all
models are resampled on the same problems, since they answered the same ones (paired). Where the
interval of teacher - init holds 0 the two cannot be told apart, and where it lies below 0 the
teacher is worse: either way recovery is not given, and Norm is the mean over the other domains.

Legend: S resamples, P problems, M models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    domain to its teacher's name. Domains without a route have no teacher and no recovery.
    """
    domains: dict[str, dict[str, Any]] = {}
    recovery_DS: dict[str, list[Array]] = {"sampled": [], "greedy": []}
    gain_DS: dict[str, list[Array]] = {"sampled": [], "greedy": []}
    for number, name in enumerate(scores["student"]):
        teacher = f"teachers.{routes[name]}" if name in routes else None
        columns = {"init": scores["init"][name], "student": scores["student"][name]}
        if teacher:
            columns["teacher"] = scores[teacher][name]
        weight_SP = _resample(len(columns["init"].sampled), resamples, [seed, number])
        row: dict[str, Any] = {"num_problems": int(weight_SP.shape[1])}
        for decoding, kept in recovery_DS.items():
            values = {model: getattr(column, decoding) for model, column in columns.items()}
            table, recovered_S = _domain(values, weight_SP)
            # [S, P] @ [P] -> [S].
            gain_S = weight_SP @ (values["student"] - values["init"])
            table["gain"] = _interval(float(np.mean(values["student"] - values["init"])), gain_S)
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
    result["models"] = {
        model: {
            name: {
                "sampled": float(column.sampled.mean()),
                "greedy": float(column.greedy.mean()),
            }
            for name, column in by_domain.items()
        }
        for model, by_domain in scores.items()
    }
    return result


def mean_interval(scores: Sequence[Array], *, resamples: int, seed: int) -> dict[str, float]:
    """The mean over domains of their means, `value`, with its interval, `low` to `high`.

    `scores` has one array [P] per domain. Equal numbers of problems draw the same resamples.
    """
    value_S = np.zeros(resamples)
    for number, score_P in enumerate(scores):
        value_S += _resample(len(score_P), resamples, [seed, number]) @ score_P / len(scores)
    return _interval(float(np.mean([score_P.mean() for score_P in scores])), value_S)


def _domain(columns: Mapping[str, Array], weight_SP: Array) -> tuple[dict[str, Any], Array | None]:
    """One domain under one decoding, and the resampled recoveries where there is a recovery."""
    mean_S = {model: weight_SP @ column for model, column in columns.items()}
    table: dict[str, Any] = {
        model: _interval(float(column.mean()), mean_S[model]) for model, column in columns.items()
    }
    table |= {"teacher": table.get("teacher"), "recovery": None, "note": None}
    if "teacher" not in columns:
        table["note"] = "no teacher"
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


def _mean_gain(rows: Sequence[Mapping[str, Any]], gain_DS: list[Array]) -> Value:
    """What the student gained on the init, mean over domains."""
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
