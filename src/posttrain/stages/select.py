"""Choose among rollouts what is worth imitating: rejection sampling's second half."""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.engine.errors import ConfigError
from posttrain.stages.batches import kept
from posttrain.stages.context import Context
from posttrain.stages.rollouts import write_jsonl
from posttrain.stages.rows import (
    Row,
    by_problem,
    clean,
    key_of,
    read_rollouts,
    value_of,
    without_thought,
)
from posttrain.stages.settings.data import Select


def run(config: Select, ctx: Context) -> dict[str, float]:
    """Write data.jsonl, rows of prompt and demo, from the rollouts of one stage or several."""
    rollouts = of_steps(config, read_rollouts(ctx), ctx.name)
    problems = by_problem(row for row in rollouts if passes(config, row))
    chosen = choose(config, list(problems.values()), ctx.name)
    if not chosen:
        raise ConfigError(
            f"stage {ctx.name!r}: how = {config.how!r} keeps none of {len(rollouts)} rollouts; "
            "sample from a better model, raise k, loosen the conditions, or use how = 'best' where "
            "the verifier gives part scores"
        )
    if config.strip_thought:
        chosen = [without_thought(row) for row in chosen]
    write_jsonl(
        ctx.out / "data.jsonl",
        (
            kept(row, "id", "domain", "prompt", "reward", "mode") | {"demo": row["response"]}
            for row in chosen
        ),
    )
    return {"rows": len(chosen), "kept_share": len(chosen) / len(rollouts)}


def of_steps(config: Select, rollouts: list[Row], stage: str) -> list[Row]:
    """The rollouts of the steps asked for. Raises ConfigError for one that has no step."""
    if config.first_step is None and config.last_step is None:
        return rollouts
    if any("step" not in row for row in rollouts):
        raise ConfigError(
            f"stage {stage!r}: first_step and last_step choose among the rollouts of rl stages; "
            "these have no step, leave both out"
        )
    first = config.first_step or 0
    last = math.inf if config.last_step is None else config.last_step
    found = [row for row in rollouts if first <= row["step"] <= last]
    if not found:
        steps = [row["step"] for row in rollouts]
        raise ConfigError(
            f"stage {stage!r}: no rollout is of a step from {first} to {last}; there are those of "
            f"steps {min(steps, default=0)} to {max(steps, default=0)}"
        )
    return found


def passes(config: Select, row: Row) -> bool:
    """Whether a response meets the conditions that look at it alone."""
    if config.success is not None and (row["reward"] >= 1.0) != config.success:
        return False
    if config.min_tokens is not None and row["num_tokens"] < config.min_tokens:
        return False
    return clean(
        row,
        max_tokens=config.max_tokens,
        language=config.language,
        max_repetition=config.max_repetition,
        repetition_n=config.repetition_n,
    )


def choose(config: Select, problems: Sequence[list[Row]], stage: str = "") -> list[Row]:
    """The rows that stay of these problems' distinct ones, at most `max_per_prompt` of each."""
    if config.how == "top_share":
        return top_share(config, problems, stage)
    return [row for rows in problems for row in _of_one(config, rows, stage)]


def top_share(config: Select, problems: Sequence[list[Row]], stage: str) -> list[Row]:
    """The best `share` of all rows, rounded up, equal ones as they come; then the limit."""
    rows = [row for of_problem in problems for row in of_problem]
    order = sorted(range(len(rows)), key=lambda i: -value_of(rows[i], config.by, stage))
    best = set(order[: math.ceil((config.share or 0) * len(rows))])
    taken: dict[object, list[Row]] = {}
    for i in order:
        of_problem = taken.setdefault(key_of(rows[i]), [])
        if i in best and (config.max_per_prompt is None or len(of_problem) < config.max_per_prompt):
            of_problem.append(rows[i])
    return [row for of_problem in problems if of_problem for row in taken[key_of(of_problem[0])]]


def _of_one(config: Select, rows: list[Row], stage: str) -> list[Row]:
    if config.how == "best":
        values = [value_of(row, config.by, stage) for row in rows]
        best = max(values, default=0.0)
        # A reward of 0 is a failure; a score has no such zero.
        good = config.by == "score" or best > 0
        found = [row for row, value in zip(rows, values, strict=True) if good and value == best]
    elif config.how == "all":
        found = rows
    else:
        found = [row for row in rows if row["reward"] >= 1.0]
    if config.how == "shortest_correct":
        return sorted(found, key=lambda row: len(row["response"]))[:1]
    return found[: config.max_per_prompt]
