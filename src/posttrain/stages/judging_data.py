"""Rows that teach a model to compare: which of two rollouts is the better one."""

from __future__ import annotations

from posttrain.engine.errors import ConfigError
from posttrain.rewards.comparisons import build_comparisons
from posttrain.stages.context import Context
from posttrain.stages.rollouts import write_jsonl
from posttrain.stages.rows import read_rollouts
from posttrain.stages.settings.data import Comparisons

DOMAIN = "comparisons"
"""What the rows have as their domain: they are a task of their own."""


def run(config: Comparisons, ctx: Context) -> dict[str, float]:
    """Write data.jsonl: questions as `judges.compare` and `judges.itself` ask them, and verdicts.

    Raises ConfigError where no two responses to one problem differ in their rewards.
    """
    try:
        rows = build_comparisons(
            read_rollouts(ctx),
            template=config.template,
            max_per_prompt=config.max_per_prompt,
            min_margin=config.min_margin,
        )
    except ConfigError as error:
        raise ConfigError(f"stage {ctx.name!r}: {error}") from None
    write_jsonl(ctx.out / "data.jsonl", (row | {"domain": DOMAIN} for row in rows))
    return {"rows": len(rows)}
