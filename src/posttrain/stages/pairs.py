"""Pairs out of rollouts: preference pairs, and comparisons that train a judge.

A preference pair is, for one problem, a response to prefer and one to avoid: by what a judge
prefers, by value among the responses to a problem (on-policy pairs), or, without any judge, the
response of a strong model against that of a weak one (delta learning: OLMo 3, arXiv 2512.13961).
"""

from __future__ import annotations

import hashlib
import json
from itertools import combinations
from typing import Any

from posttrain.algorithms import AllPairs, BestAgainstWorst, RandomPairs, StrongAgainstWeak
from posttrain.engine.errors import ConfigError
from posttrain.engine.exact import difference
from posttrain.engine.jsonl import write_jsonl
from posttrain.rewards.comparisons import build_comparisons
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.people import Pair
from posttrain.stages.context import Context
from posttrain.stages.judging import ROLLOUTS, StageTools, judge_readers, judge_rows, make_reward
from posttrain.stages.lengths import fit_responses
from posttrain.stages.rows import (
    SIDES,
    Key,
    Row,
    by_problem,
    check_values,
    clean,
    key_of,
    pick,
    problems_of,
    read_rollouts,
)
from posttrain.stages.sampled_ids import taken, tell_without_ids
from posttrain.stages.settings.data import Comparisons, Pairs
from posttrain.stages.signs import few_kept


def run(settings: Pairs, ctx: Context) -> dict[str, float]:
    """Write pairs.jsonl: id, domain, prompt, chosen, rejected, and where there is a verifier
    rewards (of both, in this order)."""
    judge, how = settings.judge, settings.how
    first, second = read_rollouts(ctx), read_rollouts(ctx, "against")
    tell_without_ids(ctx, first + second)
    if judge is None and settings.compares_values:
        check_values(first + second, settings.by, ctx.name)
    if settings.min_chosen_reward is not None:
        check_values(first, "reward", ctx.name)
    ours = by_problem(first)
    if judge is not None and (not settings.pairwise or isinstance(how, BestAgainstWorst)):
        ours = with_scores(judge, settings, ctx, ours)
    theirs = by_problem(second) or ours
    if judge is not None and settings.pairwise:
        found = preferred(judge, settings, ctx, ours)
    else:
        found = {k: choose(settings, rows, theirs.get(k, [])) for k, rows in ours.items()}
    pairs = [pair for of_problem in found.values() for pair in of_problem]
    if not pairs:
        raise ConfigError(
            f"stage {ctx.name!r}: how = {how.kind!r} finds no pair among the responses to "
            f"{len(ours)} problems; {advice(settings, ours, theirs)}"
        )
    few_kept(
        ctx, sum(map(bool, found.values())), len(found), "problems", advice(settings, ours, theirs)
    )
    rows = [row_of(settings, *pair) for pair in pairs]
    write_jsonl(ctx.out / "pairs.jsonl", rows)
    verified = [pair for pair in pairs if all(row["reward"] is not None for row in pair)]
    margin = sum(c["reward"] - r["reward"] for c, r in verified) / max(1, len(verified))
    return {
        "rows": len(rows),
        "kept_share": sum(map(bool, found.values())) / len(found),
        # Nothing is known of responses that nobody verifies.
        **({"reward_margin": margin} if verified else {}),
        "length_gap": sum(len(row["chosen"]) - len(row["rejected"]) for row in rows) / len(rows),
    }


def row_of(settings: Pairs, chosen: Row, rejected: Row) -> Row:
    """The row of pairs.jsonl."""
    row = pick(chosen, "id", "domain", "prompt", "mode", "messages")
    for side, said in zip(SIDES, (chosen, rejected), strict=True):
        row |= {side: said["response"]} | taken(said, "response", side)
    if chosen["reward"] is not None:
        row["rewards"] = [chosen["reward"], rejected["reward"]]
    if settings.pairwise:
        # None where people did not say.
        return row | ({} if chosen["strength"] is None else {"strength": chosen["strength"]})
    if settings.by == "score":
        row["margin"] = chosen["score"] - rejected["score"]
    return row


def with_scores(
    judge: Judge, settings: Pairs, ctx: Context, problems: dict[Key, list[Row]]
) -> dict[Key, list[Row]]:
    """The responses with the judge's score of each."""
    rows = [row for of_problem in problems.values() for row in of_problem]
    reward = make_reward(judge, ctx, seed=settings.seed, cut=settings.on_long == "truncate")
    readers = judge_readers(judge, ctx)
    rows = fit_responses({ROLLOUTS: rows}, settings, ctx, readers, fields=["response"])[ROLLOUTS]
    # Every problem stays, also one without a response that fits.
    found: dict[Key, list[Row]] = {key: [] for key in problems}
    for row, score in zip(rows, judge_rows(ctx, reward, rows), strict=True):
        found[key_of(row)].append(row | {"score": score})
    return found


def preferred(
    judge: Judge, settings: Pairs, ctx: Context, problems: dict[Key, list[Row]]
) -> dict[Key, list[tuple[Row, Row]]]:
    """The pairs (chosen, rejected) of each problem by a judge that compares two responses.

    It is asked about at most `max_per_prompt` pairs of a problem; then come the filters. The chosen
    row has the `strength` of the preference, 1 to 4. A tie is no pair.
    """
    asked: list[tuple[Key, Row, Row]] = []
    for key, rows in problems.items():
        asked += [(key, one, other) for one, other in pairs_to_ask(settings, rows)]
    whole = problems_of(ctx, [one for _, one, _ in asked])
    questions = [
        Pair(problem=problem, first=one["response"], second=other["response"])
        for problem, (_, one, other) in zip(whole, asked, strict=True)
    ]
    found: dict[Key, list[tuple[Row, Row]]] = {key: [] for key in problems}
    scorer: Any = judge.scorer(StageTools(ctx=ctx, seed=settings.seed))
    answers = scorer.prefer(questions)
    for (key, one, other), answer in zip(asked, answers, strict=True):
        winner, loser = (one, other) if answer.first > 0.5 else (other, one)
        winner = winner | {"strength": answer.strength}
        enough = (answer.strength or 0) >= (settings.how.min_margin or 0)
        if answer.first != 0.5 and enough and filtered(settings, winner, loser):
            found[key].append((winner, loser))
    return found


def pairs_to_ask(settings: Pairs, rows: list[Row]) -> list[tuple[Row, Row]]:
    """The pairs of one problem's responses that a judge is asked about."""
    how = settings.how
    pairs = list(combinations(rows, 2))
    if isinstance(how, RandomPairs):
        pairs.sort(key=lambda pair: shuffled(pair, settings.seed))
    elif isinstance(how, BestAgainstWorst):
        best_first = sorted(rows, key=lambda row: -row["score"])
        pairs = list(zip(best_first, best_first[::-1], strict=True))
        pairs = [(one, other) for one, other in pairs if one["score"] > other["score"]]
    return pairs if isinstance(how, AllPairs) else pairs[: how.max_per_prompt]


def choose(settings: Pairs, ours: list[Row], theirs: list[Row]) -> list[tuple[Row, Row]]:
    """The pairs (chosen, rejected) of one problem, at most `max_per_prompt` unless it is all.

    Of one stage's rollouts both lists are the same. Equal values keep the order in which they were
    sampled.
    """
    how, by = settings.how, settings.by
    if isinstance(how, BestAgainstWorst):
        ours = sorted(ours, key=lambda row: -row[by])
        theirs = sorted(theirs, key=lambda row: row[by])
    candidates = list(zip(ours, theirs, strict=False))
    if isinstance(how, AllPairs | RandomPairs):
        candidates = [better_first(by, *pair) for pair in combinations(ours, 2)]
    if isinstance(how, RandomPairs):
        candidates.sort(key=lambda pair: shuffled(pair, settings.seed))
    fitting = [pair for pair in candidates if fits(settings, *pair)]
    return fitting if isinstance(how, AllPairs) else fitting[: how.max_per_prompt]


def better_first(by: str, one: Row, other: Row) -> tuple[Row, Row]:
    """The two responses, that with the higher value first."""
    return (other, one) if one[by] < other[by] else (one, other)


def shuffled(pair: tuple[Row, Row], seed: int) -> str:
    """A sort key as good as random that depends on the seed and the texts of the pair alone."""
    texts = [seed, pair[0]["id"], *sorted(row["response"] for row in pair)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def fits(settings: Pairs, chosen: Row, rejected: Row) -> bool:
    """Whether a pair shows a preference and passes every filter."""
    if chosen["response"] == rejected["response"]:
        return False
    if settings.compares_values:
        margin = difference(chosen[settings.by], rejected[settings.by])
        if margin <= 0 or margin < (settings.how.min_margin or 0):
            return False
    return filtered(settings, chosen, rejected)


def filtered(settings: Pairs, chosen: Row, rejected: Row) -> bool:
    """Whether a pair passes the filters that do not look at the preference."""
    if settings.min_chosen_reward is not None and chosen["reward"] < settings.min_chosen_reward:
        return False
    gap = abs(len(chosen["response"]) - len(rejected["response"]))
    if settings.max_length_gap is not None and gap > settings.max_length_gap:
        return False
    return clean(
        chosen,
        max_tokens=settings.chosen_max_tokens,
        language=settings.chosen_language,
        max_repetition=settings.chosen_max_repetition,
    )


def advice(settings: Pairs, ours: dict[Any, Any], theirs: dict[Any, Any]) -> str:
    """What to change where no pair was found."""
    if not ours.keys() & theirs.keys():
        return "the two stages answer no common problem; sample both from the same prompts"
    if isinstance(settings.how, StrongAgainstWeak):
        return "loosen min_margin, min_chosen_reward or max_length_gap, or raise max_new_tokens"
    if settings.pairwise:
        return "raise k of the sample stage, or loosen min_margin or the other filters"
    return "raise k of the sample stage, or loosen min_margin, min_chosen_reward or max_length_gap"


def run_comparisons(settings: Comparisons, ctx: Context) -> dict[str, float]:
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
