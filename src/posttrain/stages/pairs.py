"""Preference pairs out of rollouts: for one problem, a response to prefer and one to avoid.

By reward among the responses of one `sample` stage (on-policy pairs), or, without any judge, the
response of a strong model against that of a weak one (delta learning: OLMo 3, arXiv 2512.13961).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.stages.batches import kept
from posttrain.stages.context import Context
from posttrain.stages.rollouts import write_jsonl
from posttrain.stages.settings.preference import Pairs

Rollout = dict[str, Any]
Key = tuple[str, str, str | None]
"""Domain, id and mode: responses in two modes are not compared."""


def run(config: Pairs, ctx: Context) -> dict[str, float]:
    """Write pairs.jsonl: id, domain, prompt, chosen, rejected, rewards (of both, in this order)."""
    ours = by_problem(ctx.inputs["rollouts"])
    theirs = by_problem(ctx.inputs["against"]) if "against" in ctx.inputs else ours
    found = {key: choose(config, rows, theirs.get(key, [])) for key, rows in ours.items()}
    pairs = [pair for of_problem in found.values() for pair in of_problem]
    if not pairs:
        raise ConfigError(
            f"stage {ctx.name!r}: how = {config.how!r} finds no pair among the responses to "
            f"{len(ours)} problems; {advice(config, ours, theirs)}"
        )
    rows = [
        kept(chosen, "id", "domain", "prompt", "mode")
        | {"chosen": chosen["response"], "rejected": rejected["response"]}
        | {"rewards": [chosen["reward"], rejected["reward"]]}
        for chosen, rejected in pairs
    ]
    write_jsonl(ctx.out / "pairs.jsonl", rows)
    return {
        "rows": len(rows),
        "kept_share": sum(map(bool, found.values())) / len(found),
        "reward_margin": sum(c["reward"] - r["reward"] for c, r in pairs) / len(rows),
        "length_gap": sum(len(row["chosen"]) - len(row["rejected"]) for row in rows) / len(rows),
    }


def by_problem(path: Path) -> dict[Key, list[Rollout]]:
    """Domain, id and mode to the distinct finished responses of a `sample` stage, as sampled.

    A response that was cut at the length limit belongs in no pair: it would be learned, or
    unlearned, with an end that it does not have.
    """
    found: dict[Key, dict[str, Rollout]] = {}
    with (path / "rollouts.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            responses = found.setdefault((row["domain"], row["id"], row.get("mode")), {})
            if row["finished"]:
                responses.setdefault(row["response"], row)
    return {key: list(responses.values()) for key, responses in found.items()}


def choose(
    config: Pairs, ours: list[Rollout], theirs: list[Rollout]
) -> list[tuple[Rollout, Rollout]]:
    """The pairs (chosen, rejected) of one problem, at most `max_per_prompt`.

    For best_against_worst both lists are the same rollouts. Equal rewards keep the order in which
    they were sampled.
    """
    if config.how == "best_against_worst":
        ours = sorted(ours, key=lambda row: -row["reward"])
        theirs = sorted(theirs, key=lambda row: row["reward"])
    fitting = (pair for pair in zip(ours, theirs, strict=False) if fits(config, *pair))
    return [pair for _, pair in zip(range(config.max_per_prompt), fitting, strict=False)]


def fits(config: Pairs, chosen: Rollout, rejected: Rollout) -> bool:
    """Whether a pair shows a preference and passes every filter."""
    margin = chosen["reward"] - rejected["reward"]
    if config.how == "best_against_worst" and margin <= 0:
        return False
    if config.min_margin is not None and margin < config.min_margin:
        return False
    if config.min_chosen_reward is not None and chosen["reward"] < config.min_chosen_reward:
        return False
    gap = abs(len(chosen["response"]) - len(rejected["response"]))
    if config.max_length_gap is not None and gap > config.max_length_gap:
        return False
    return bool(chosen["response"] != rejected["response"])


def advice(config: Pairs, ours: dict[Any, Any], theirs: dict[Any, Any]) -> str:
    """What to change where no pair was found."""
    if not ours.keys() & theirs.keys():
        return "the two stages answer no common problem; sample both from the same prompts"
    if config.how == "strong_against_weak":
        return "loosen min_margin, min_chosen_reward or max_length_gap, or raise max_new_tokens"
    return "raise k of the sample stage, or loosen min_margin, min_chosen_reward or max_length_gap"
