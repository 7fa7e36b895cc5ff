"""Preference pairs out of rollouts: for one problem, a response to prefer and one to avoid.

By what a judge prefers, by value among the responses to a problem (on-policy pairs), or, without
any judge, the response of a strong model against that of a weak one (delta learning: OLMo 3, arXiv
2512.13961).
"""

from __future__ import annotations

import hashlib
import json
from itertools import combinations
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.people import Pair
from posttrain.stages.batches import kept
from posttrain.stages.context import Context
from posttrain.stages.judging import make_reward, preferences
from posttrain.stages.rollouts import write_jsonl
from posttrain.stages.rows import (
    Key,
    Row,
    by_problem,
    clean,
    problems_of,
    read_rollouts,
    value_of,
)
from posttrain.stages.score import judge_rows
from posttrain.stages.settings.preference import Pairs


def run(config: Pairs, ctx: Context) -> dict[str, float]:
    """Write pairs.jsonl: id, domain, prompt, chosen, rejected, rewards (of both, in this order)."""
    ours = by_problem(read_rollouts(ctx))
    if config.judge is not None and (not config.pairwise or config.how == "best_against_worst"):
        ours = with_scores(config.judge, config, ctx, ours)
    theirs = by_problem(read_rollouts(ctx, "against")) or ours
    if config.judge is not None and config.pairwise:
        found = preferred(config.judge, config, ctx, ours)
    else:
        found = {k: choose(config, rows, theirs.get(k, []), ctx.name) for k, rows in ours.items()}
    pairs = [pair for of_problem in found.values() for pair in of_problem]
    if not pairs:
        raise ConfigError(
            f"stage {ctx.name!r}: how = {config.how!r} finds no pair among the responses to "
            f"{len(ours)} problems; {advice(config, ours, theirs)}"
        )
    rows = [row_of(config, *pair) for pair in pairs]
    write_jsonl(ctx.out / "pairs.jsonl", rows)
    return {
        "rows": len(rows),
        "kept_share": sum(map(bool, found.values())) / len(found),
        "reward_margin": sum(c["reward"] - r["reward"] for c, r in pairs) / len(rows),
        "length_gap": sum(len(row["chosen"]) - len(row["rejected"]) for row in rows) / len(rows),
    }


def row_of(config: Pairs, chosen: Row, rejected: Row) -> Row:
    """The row of pairs.jsonl."""
    row = kept(chosen, "id", "domain", "prompt", "mode")
    row |= {"chosen": chosen["response"], "rejected": rejected["response"]}
    row |= {"rewards": [chosen["reward"], rejected["reward"]]}
    if config.pairwise:
        # None where people did not say.
        return row | ({} if chosen["strength"] is None else {"strength": chosen["strength"]})
    if config.by == "score":
        row["margin"] = chosen["score"] - rejected["score"]
    return row


def with_scores(
    judge: Judge, config: Pairs, ctx: Context, problems: dict[Key, list[Row]]
) -> dict[Key, list[Row]]:
    """The responses with the judge's score of each."""
    rows = [row for of_problem in problems.values() for row in of_problem]
    reward = make_reward(judge, ctx, seed=config.seed)
    scores = iter(judge_rows(ctx, reward, rows))
    return {
        key: [row | {"score": next(scores)} for row in of_problem]
        for key, of_problem in problems.items()
    }


def preferred(
    judge: Judge, config: Pairs, ctx: Context, problems: dict[Key, list[Row]]
) -> dict[Key, list[tuple[Row, Row]]]:
    """The pairs (chosen, rejected) of each problem by a judge that compares two responses.

    It is asked about at most `max_per_prompt` pairs of a problem; then come the filters. The chosen
    row has the `strength` of the preference, 1 to 4. A tie is no pair.
    """
    asked: list[tuple[Key, Row, Row]] = []
    for key, rows in problems.items():
        pairs = list(combinations(rows, 2))
        if config.how == "random":
            pairs.sort(key=lambda pair: shuffled(pair, config.seed))
        elif config.how == "best_against_worst":
            best_first = sorted(rows, key=lambda row: -row["score"])
            pairs = list(zip(best_first, best_first[::-1], strict=True))
            pairs = [(one, other) for one, other in pairs if one["score"] > other["score"]]
        if config.how != "all":
            pairs = pairs[: config.max_per_prompt]
        asked += [(key, one, other) for one, other in pairs]
    whole = problems_of(ctx, [one for _, one, _ in asked])
    questions = [
        Pair(problem=problem, first=one["response"], second=other["response"])
        for problem, (_, one, other) in zip(whole, asked, strict=True)
    ]
    found: dict[Key, list[tuple[Row, Row]]] = {key: [] for key in problems}
    answers = preferences(judge, ctx, questions, seed=config.seed)
    for (key, one, other), answer in zip(asked, answers, strict=True):
        winner, loser = (one, other) if answer.first > 0.5 else (other, one)
        winner = winner | {"strength": answer.strength}
        enough = config.min_strength is None or (answer.strength or 0) >= config.min_strength
        if answer.first != 0.5 and enough and filtered(config, winner, loser):
            found[key].append((winner, loser))
    return found


def choose(
    config: Pairs, ours: list[Row], theirs: list[Row], stage: str = ""
) -> list[tuple[Row, Row]]:
    """The pairs (chosen, rejected) of one problem, at most `max_per_prompt` unless it is all.

    Of one stage's rollouts both lists are the same. Equal values keep the order in which they were
    sampled.
    """
    if config.how == "best_against_worst":
        ours = sorted(ours, key=lambda row: -value_of(row, config.by, stage))
        theirs = sorted(theirs, key=lambda row: value_of(row, config.by, stage))
    candidates = list(zip(ours, theirs, strict=False))
    if config.how in ("all", "random"):
        candidates = [better_first(config, *pair, stage) for pair in combinations(ours, 2)]
    if config.how == "random":
        candidates.sort(key=lambda pair: shuffled(pair, config.seed))
    fitting = [pair for pair in candidates if fits(config, *pair, stage)]
    return fitting if config.how == "all" else fitting[: config.max_per_prompt]


def better_first(config: Pairs, one: Row, other: Row, stage: str) -> tuple[Row, Row]:
    """The two responses, that with the higher value first."""
    if value_of(one, config.by, stage) < value_of(other, config.by, stage):
        return other, one
    return one, other


def shuffled(pair: tuple[Row, Row], seed: int) -> str:
    """A sort key as good as random that depends on the seed and the texts of the pair alone."""
    texts = [seed, pair[0]["id"], *sorted(row["response"] for row in pair)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def fits(config: Pairs, chosen: Row, rejected: Row, stage: str) -> bool:
    """Whether a pair shows a preference and passes every filter."""
    if chosen["response"] == rejected["response"]:
        return False
    if config.how != "strong_against_weak" or config.min_margin is not None:
        values = [value_of(row, config.by, stage) for row in (chosen, rejected)]
        margin = values[0] - values[1]
        if config.how != "strong_against_weak" and margin <= 0:
            return False
        if config.min_margin is not None and margin < config.min_margin:
            return False
    return filtered(config, chosen, rejected)


def filtered(config: Pairs, chosen: Row, rejected: Row) -> bool:
    """Whether a pair passes the filters that do not look at the preference."""
    if config.min_chosen_reward is not None and chosen["reward"] < config.min_chosen_reward:
        return False
    gap = abs(len(chosen["response"]) - len(rejected["response"]))
    if config.max_length_gap is not None and gap > config.max_length_gap:
        return False
    return clean(
        chosen,
        max_tokens=config.chosen_max_tokens,
        language=config.chosen_language,
        max_repetition=config.chosen_max_repetition,
    )


def advice(config: Pairs, ours: dict[Any, Any], theirs: dict[Any, Any]) -> str:
    """What to change where no pair was found."""
    if not ours.keys() & theirs.keys():
        return "the two stages answer no common problem; sample both from the same prompts"
    if config.how == "strong_against_weak":
        return "loosen min_margin, min_chosen_reward or max_length_gap, or raise max_new_tokens"
    if config.pairwise:
        return "raise k of the sample stage, or loosen min_strength or the other filters"
    return "raise k of the sample stage, or loosen min_margin, min_chosen_reward or max_length_gap"
