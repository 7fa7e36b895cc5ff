"""Choose among rollouts what is worth imitating: rejection sampling's second half."""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.algorithms import BestResponses, Correct, Selection, ShortestCorrect, TopShare
from posttrain.engine.errors import ConfigError
from posttrain.engine.exact import rounded_up
from posttrain.engine.jsonl import write_jsonl
from posttrain.stages.context import Context
from posttrain.stages.rows import (
    Row,
    by_problem,
    check_values,
    clean,
    key_of,
    pick,
    read_rollouts,
    without_thought,
)
from posttrain.stages.sampled_ids import taken, tell_without_ids
from posttrain.stages.settings.data import Select
from posttrain.stages.signs import few_kept


def run(settings: Select, ctx: Context) -> dict[str, float]:
    """Write data.jsonl, rows of prompt and demo, from the rollouts of one stage or several."""
    rollouts = of_steps(settings, read_rollouts(ctx), ctx.name)
    tell_without_ids(ctx, rollouts)
    if isinstance(settings.how, BestResponses | TopShare):
        check_values(rollouts, settings.how.by, ctx.name)
    if by_success(settings.how):
        check_values(rollouts, "reward", ctx.name)
    problems = by_problem(row for row in rollouts if passes(settings, row))
    chosen = choose(settings.how, list(problems.values()))
    if not chosen:
        raise ConfigError(
            f"stage {ctx.name!r}: how = {settings.how.kind!r} keeps none of {len(rollouts)} "
            "rollouts; sample from a better model, raise k, loosen the conditions, or use how = "
            "'best' where the verifier gives part scores"
        )
    if not isinstance(settings.how, TopShare):  # which was told how many to keep
        kept = len({key_of(row) for row in chosen})
        fix = "sample from a better model, raise k, or loosen the conditions"
        few_kept(ctx, kept, len({key_of(row) for row in rollouts}), "problems", fix)
    if settings.strip_thought:
        chosen = [without_thought(row) for row in chosen]
    fields = ("id", "domain", "prompt", "reward", "mode", "messages")
    demos = (
        pick(row, *fields) | {"demo": row["response"]} | taken(row, "response", "demo")
        for row in chosen
    )
    write_jsonl(ctx.out / "data.jsonl", demos)
    return {"rows": len(chosen), "kept_share": len(chosen) / len(rollouts)}


def by_success(how: Selection) -> bool:
    """Whether a choice goes by what the verifier found right, whatever else it goes by."""
    return isinstance(how, Correct | ShortestCorrect) or getattr(how, "success", None) is not None


def of_steps(settings: Select, rollouts: list[Row], stage: str) -> list[Row]:
    """The rollouts of the steps asked for. Raises ConfigError for one that has no step."""
    if settings.first_step is None and settings.last_step is None:
        return rollouts
    if any("step" not in row for row in rollouts):
        raise ConfigError(
            f"stage {stage!r}: first_step and last_step choose among the rollouts of rl stages; "
            "these have no step, leave both out"
        )
    first = settings.first_step or 0
    last = math.inf if settings.last_step is None else settings.last_step
    found = [row for row in rollouts if first <= row["step"] <= last]
    if not found:
        steps = [row["step"] for row in rollouts]
        raise ConfigError(
            f"stage {stage!r}: no rollout is of a step from {first} to {last}; there are those of "
            f"steps {min(steps, default=0)} to {max(steps, default=0)}"
        )
    return found


def passes(settings: Select, row: Row) -> bool:
    """Whether a response meets the conditions that look at it alone."""
    success = getattr(settings.how, "success", None)
    if success is not None and (row["reward"] >= 1.0) != success:
        return False
    if settings.min_tokens is not None and row["num_tokens"] < settings.min_tokens:
        return False
    return clean(
        row,
        max_tokens=settings.max_tokens,
        language=settings.language,
        max_repetition=settings.max_repetition,
    )


def choose(how: Selection, problems: Sequence[list[Row]]) -> list[Row]:
    """The rows that stay of these problems' distinct ones, at most `max_per_prompt` of each."""
    if isinstance(how, TopShare):
        return top_share(how, problems)
    return [row for rows in problems for row in _of_one(how, rows)]


def top_share(how: TopShare, problems: Sequence[list[Row]]) -> list[Row]:
    """The best `share` of all rows, rounded up, equal ones as they come; then the limit."""
    rows = [row for of_problem in problems for row in of_problem]
    order = sorted(range(len(rows)), key=lambda i: -rows[i][how.by])
    best = set(order[: rounded_up(how.share, len(rows))])
    taken: dict[object, list[Row]] = {}
    for i in order:
        of_problem = taken.setdefault(key_of(rows[i]), [])
        if i in best and (how.max_per_prompt is None or len(of_problem) < how.max_per_prompt):
            of_problem.append(rows[i])
    return [row for of_problem in problems if of_problem for row in taken[key_of(of_problem[0])]]


def _of_one(how: Selection, rows: list[Row]) -> list[Row]:
    if isinstance(how, Correct | ShortestCorrect):
        rows = [row for row in rows if row["reward"] >= 1.0]
    if isinstance(how, ShortestCorrect):
        return sorted(rows, key=lambda row: len(row["response"]))[:1]
    if isinstance(how, BestResponses):
        values = [row[how.by] for row in rows]
        best = max(values, default=0.0)
        # A reward of 0 is a failure; a score has no such zero.
        good = how.by == "score" or best > 0
        rows = [row for row, value in zip(rows, values, strict=True) if good and value == best]
    return rows[: how.max_per_prompt]
