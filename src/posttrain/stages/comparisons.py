"""Rollouts as problems that train a judge: which of two responses is the better one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.engine.errors import ConfigError
from posttrain.engine.jsonl import write_jsonl
from posttrain.rewards.comparisons import build_comparisons
from posttrain.stages.rows import by_problem, read_rollouts
from posttrain.stages.settings.data import Comparisons

if TYPE_CHECKING:  # it imports torch
    from posttrain.stages.context import Context


def run(settings: Comparisons, ctx: Context) -> dict[str, float]:
    """Write data.jsonl, rows of question and verdict, from rollouts whose rewards are known."""
    finished = [row for row in read_rollouts(ctx) if row["finished"]]
    try:
        rows = build_comparisons(
            by_problem(finished),
            template=settings.template,
            max_per_prompt=settings.max_per_prompt,
            min_margin=settings.min_margin,
        )
    except ConfigError as error:
        raise ConfigError(f"stage {ctx.name!r}: {error}") from None
    write_jsonl(ctx.out / "data.jsonl", rows)
    return {"rows": len(rows), "first_share": sum(row["answer"] == "1" for row in rows) / len(rows)}
