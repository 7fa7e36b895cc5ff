"""Training prompts chosen by how hard they are for a model, or harder for one than for another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from posttrain.backends.prompting import Problem
from posttrain.engine.errors import ConfigError
from posttrain.engine.jsonl import read_jsonl, write_jsonl
from posttrain.stages.rows import Key, key_of
from posttrain.stages.settings.data import Filter

if TYPE_CHECKING:  # it imports torch
    from posttrain.stages.context import Context

Rates = Mapping[Key, float]


def run(settings: Filter, ctx: Context) -> dict[str, float]:
    """Write prompts.jsonl, whole problem rows, of the training problems that both profiles know."""
    rates, others = read_rates(ctx, "profile"), read_rates(ctx, "against")
    chosen: list[Problem] = []
    known, total = 0, 0
    problems_of = {name: ctx.problems(name, "train", settings.modes) for name in ctx.domains}
    everything = [problem for problems in problems_of.values() for problem in problems]
    rates, others = across_modes(rates, everything), across_modes(others, everything)
    for name, problems in problems_of.items():
        profiled = [
            problem
            for problem in problems
            if key_of(problem) in rates and (not others or key_of(problem) in others)
        ]
        if not profiled:
            raise ConfigError(
                f"stage {ctx.name!r}: no profile has a problem of domain {name!r} among its "
                f"{len(problems)} prompts; profile the same prompts as are filtered"
            )
        chosen_here = choose(settings, profiled, rates, others)
        if not chosen_here:
            raise ConfigError(
                f"stage {ctx.name!r}: none of {len(profiled)} prompts of domain {name!r} is kept; "
                f"their pass rates are {min(rates[key_of(p)] for p in profiled):.3g} to "
                f"{max(rates[key_of(p)] for p in profiled):.3g}; widen the band, or give at_least"
            )
        chosen += chosen_here
        known, total = known + len(profiled), total + len(problems)
    write_jsonl(ctx.out / "prompts.jsonl", chosen)
    return {
        "rows": len(chosen),
        "kept_share": len(chosen) / total,
        "profiled_share": known / total,
        "rate": sum(rates[key_of(problem)] for problem in chosen) / len(chosen),
    }


def read_rates(ctx: Context, edge: str) -> dict[Key, float]:
    """The pass rates of the profile of an edge; none where there is no such edge."""
    if edge not in ctx.inputs:
        return {}
    return {key_of(row): row["rate"] for row in read_jsonl(ctx.inputs[edge] / "profile.jsonl")}


def across_modes(rates: Rates, problems: Sequence[Problem]) -> Rates:
    """The same rates, where those of a single mode also stand for the other mode of a problem.

    So prompts to think about can be those that are not solved without a thought (Qwen3).
    """
    modes = {mode for _, _, mode in rates}
    if len(modes) != 1 or modes == {None}:
        return rates
    (mode,) = modes
    found = {key_of(p): rates.get((p["domain"], p["id"], mode)) for p in problems}
    return {**rates, **{key: rate for key, rate in found.items() if rate is not None}}


def choose(
    settings: Filter, problems: Sequence[Problem], rates: Rates, others: Rates
) -> list[Problem]:
    """The problems of one domain that stay, in their order; `others` may be empty."""
    distances = []
    for problem in problems:
        key = key_of(problem)
        far = distance(settings, rates[key], others.get(key))
        if rates[key] == 0 and settings.keep_unsolved is not None:
            far = 0.0 if draw(settings.seed, key) < settings.keep_unsolved else 1.0
        distances.append(far)
    # Python sorts stably: of equal distances the first prompts come back.
    nearest = sorted(range(len(problems)), key=lambda i: distances[i])
    back = set(nearest[: settings.at_least])
    return [p for i, p in enumerate(problems) if distances[i] == 0 or i in back]


def distance(settings: Filter, rate: float, other: float | None) -> float:
    """How far a problem is from what is asked for, a sum over the conditions; 0 where it fits."""
    far = outside(rate, settings.low, settings.high)
    if other is not None:
        far += outside(other, settings.against_low, settings.against_high)
        if settings.min_gain is not None:
            far += max(0.0, settings.min_gain - (rate - other))
    return far


def outside(value: float, low: float, high: float) -> float:
    """Distance from `value` to the interval from `low` to `high`; 0 within."""
    return max(0.0, low - value, value - high)


def draw(seed: int, key: Key) -> float:
    """A number in [0, 1) that depends on the seed and the problem alone."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
