"""How often a model solves each problem: what difficulty filters and curricula go by."""

from __future__ import annotations

from typing import Any

from posttrain.stages.batches import kept
from posttrain.stages.context import Context
from posttrain.stages.rollouts import verifiers, write_jsonl
from posttrain.stages.sample import answers, chosen_problems
from posttrain.stages.settings.data import Profile


def run(config: Profile, ctx: Context) -> dict[str, float]:
    """Write profile.jsonl: id, domain, rate (mean reward) and samples (how many) per problem."""
    judges = verifiers(ctx)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(ctx.domains):
        tokens = 0
        for scored in answers(
            config,
            ctx,
            ctx.inputs["model"],
            chosen_problems(config, ctx, name),
            judges,
            group_size=config.n,
            number=number,
        ):
            tokens += scored.rollouts.num_tokens
            rates = scored.reward_B.double().reshape(-1, config.n).mean(dim=1).tolist()
            rows += [
                kept(problem, "id", "domain", "mode") | {"rate": rate, "samples": config.n}
                for problem, rate in zip(scored.problems[:: config.n], rates, strict=True)
            ]
        mean = sum(row["rate"] for row in rows) / len(rows)
        ctx.log(number + 1, len(ctx.domains), tokens=tokens, reward=mean)
    write_jsonl(ctx.out / "profile.jsonl", rows)
    return {
        "rows": len(rows),
        "rate": sum(row["rate"] for row in rows) / len(rows),
        "unsolved_share": sum(row["rate"] == 0 for row in rows) / len(rows),
        "solved_share": sum(row["rate"] >= 1 for row in rows) / len(rows),
    }
