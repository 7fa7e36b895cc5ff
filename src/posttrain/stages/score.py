"""Rollouts with the score of a judge beside the verifier's reward."""

from __future__ import annotations

from posttrain.engine.jsonl import write_jsonl
from posttrain.rewards.judging import Responses, RewardFunction
from posttrain.stages.context import Context
from posttrain.stages.judging import make_reward
from posttrain.stages.rows import Row, key_of, problems_of, read_rollouts
from posttrain.stages.settings.data import Score

ROWS_PER_CALL = 512
"""Responses that a judge is asked about at once, and a little more: whole groups."""


def run(settings: Score, ctx: Context) -> dict[str, float]:
    """Write rollouts.jsonl: the rollouts of one stage or several, with `score`."""
    rows = read_rollouts(ctx)
    reward = make_reward(settings.judge, ctx, precision=settings.precision, seed=settings.seed)
    scores = judge_rows(ctx, reward, rows)
    scored = [row | {"score": score} for row, score in zip(rows, scores, strict=True)]
    write_jsonl(ctx.out / "rollouts.jsonl", scored)
    return {"rows": len(rows), "score": sum(scores) / len(scores)}


def judge_rows(ctx: Context, reward: RewardFunction, rows: list[Row]) -> list[float]:
    """The judge's score of each row, a portion of them at a time, with a line of metrics each."""
    responses = responses_of_rows(ctx, rows)
    portions = reward.portions(responses, ROWS_PER_CALL)
    scores = [0.0] * len(rows)
    for number, index in enumerate(portions):
        found, _ = reward.score(responses.select(index))
        for row, value in zip(index, found, strict=True):
            scores[row] = value
        tokens = sum(rows[row]["num_tokens"] for row in index)
        ctx.log(number + 1, len(portions), tokens=tokens, score=sum(found) / len(found))
    return scores


def responses_of_rows(ctx: Context, rows: list[Row]) -> Responses:
    """Rows of rollouts for a judge; the responses to one problem in one mode are a group."""
    keys = list(dict.fromkeys(map(key_of, rows)))
    number = {key: i for i, key in enumerate(keys)}
    return Responses(
        problems=problems_of(ctx, rows),
        texts=[row["response"] for row in rows],
        group=[number[key_of(row)] for row in rows],
        finished=[row["finished"] for row in rows],
        num_tokens=[row["num_tokens"] for row in rows],
        verdicts=[row["reward"] for row in rows],
    )
