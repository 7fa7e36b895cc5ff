"""Judges that need the stage: its verifiers, its models, its work directory. And the stage `score`.

    reward = make_reward(settings.reward, ctx, policy=policy)   # once
    scores, parts = reward.score(responses_of(batch), at)       # every step

with `at = lambda schedule: schedule.at(step, total, history)`. The classes here score for the
judges of `posttrain.rewards.judge_kinds` that name them as their `SCORER`.

Legend: B rows (comparisons or responses), D hidden, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.base import Learner, Scorer
from posttrain.backends.chat import Chat
from posttrain.backends.prompting import asked
from posttrain.backends.scalar import rewards_B
from posttrain.engine.errors import ConfigError, StageError
from posttrain.engine.jsonl import write_jsonl
from posttrain.rewards.comparisons import VERDICTS, question
from posttrain.rewards.endpoint import Endpoint, ReplyCache
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.judge_kinds import (
    Compare,
    CompareEndpoint,
    Itself,
    Llm,
    Python,
    Scalar,
    Verifier,
)
from posttrain.rewards.judge_kinds import Oracle as OracleKind
from posttrain.rewards.judging import Responses, RewardFunction, comparisons, win_shares
from posttrain.rewards.oracle import Oracle
from posttrain.rewards.own_judge import GIVEN, JUDGED, write_judge
from posttrain.rewards.people import Pair, Preference
from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.watching import Watched, undeclared
from posttrain.rl.batch import Batch
from posttrain.stages.context import Context
from posttrain.stages.lengths import Reader, cut, fit_responses
from posttrain.stages.rollout import MAX_WORKERS, NAN, sampled_ids_of
from posttrain.stages.rows import Row, key_of, pick, problems_of, read_rollouts
from posttrain.stages.sampled_ids import own_ids, taken
from posttrain.stages.settings.data import Score

ROWS_PER_CALL = 512
"""Responses of a file that a judge is asked about at once, and a little more: whole groups."""

ROLLOUTS = "rollouts"
"""The one group of rows that a judge is asked about: they keep the order in which they come."""
REPLIES = "replies.jsonl"
"""In the work directory: what endpoints have answered."""


@dataclass(frozen=True, kw_only=True)
class StageTools:
    """What a stage gives to the classes that score for its judges."""

    ctx: Context
    policy: Learner | None = None
    """What `judges.itself` asks, with the weights that it has at the time."""
    precision: str = "float32"
    """Type in which models compute."""
    seed: int = 0
    """The oracle's."""
    cut: bool = False
    """Whether responses that a model has too few positions for lose their end."""

    @cached_property
    def _replies(self) -> ReplyCache:
        return ReplyCache(self.ctx.work / REPLIES)

    def endpoint(self, judge: Llm | CompareEndpoint) -> Endpoint:
        """The model of a judge; its replies are kept for all that ask the same."""
        return Endpoint(
            url=judge.url,
            model=judge.model,
            key=judge.key,
            max_tokens=judge.max_tokens,
            cache=self._replies,
        )

    def annotator(self, noise: float) -> Oracle:
        """The noisy annotator of the stage's domains; its workers end with the stage."""
        ctx = self.ctx
        pool = VerifierPool(ctx.domains, num_workers=min(ctx.threads, MAX_WORKERS), by="oracle")
        qualities = ctx.resources.enter_context(pool).scores
        return Oracle(qualities=qualities, noise=noise, seed=self.seed)

    def own_judge(self, judge: Python) -> VerifierPool:
        """The workers of a judge of the user's own, under its name; they end with the stage."""
        ctx = self.ctx
        directory = write_judge(judge.name, judge.source, judge.data, ctx.work)
        pool = VerifierPool(
            {judge.name: directory},
            num_workers=min(ctx.threads, MAX_WORKERS),
            by="judge",
            # Its declared files stand beside the copy of it; any other is none of its identity.
            watched=Watched(root=str(Path.cwd()), declared=[str(ctx.work)]),
        )
        return ctx.resources.enter_context(pool)


def make_reward(
    judge: Judge,
    ctx: Context,
    *,
    policy: Learner | None = None,
    precision: str = "float32",
    seed: int = 0,
    cut: bool = False,
) -> RewardFunction:
    """A judge ready to be asked; models are loaded once, from `ctx.inputs`.

    The arguments are those of `StageTools`. Raises ConfigError where a judge needs what is not
    given, and what loading a model raises.
    """
    tools = StageTools(ctx=ctx, policy=policy, precision=precision, seed=seed, cut=cut)
    # By identity: a judge that occurs twice is made once, and its model loaded once.
    asked = {part.identity: part for part in judge.walk() if part.SCORER}
    return RewardFunction(judge, {name: part.scorer(tools) for name, part in asked.items()})


def judge_readers(judge: Judge | None, ctx: Context) -> list[Reader]:
    """The models inside of a judge that read whole responses, and cut none."""
    edges = {part.model for part in judge.walk() if isinstance(part, Scalar)} if judge else ()
    return [
        # A response that was cut off gets a stop token, which is one more.
        Reader(name=f"the reward model {edge.partition('.')[2]!r}", chat=ctx.chat(edge), more=1)
        for edge in sorted(edges)
    ]


def responses_of(batch: Batch, step: int | None = None) -> Responses:
    """What a stage has sampled, at a step of training or at none, with the verifier's scores, as
    judges see it."""
    return Responses(
        problems=batch.problems,
        texts=batch.texts,
        group=batch["group_B"].tolist(),
        finished=batch["finished_B"].tolist(),
        num_tokens=batch.sampled_len_B.tolist(),
        verdicts=batch["verified_B"].tolist(),
        # As numbers of 4 bytes: those of an evaluation stay to its end.
        sampled=[row | {"ids": array("i", row["ids"])} for row in sampled_ids_of(batch)],
        steps=[step] * len(batch.problems),
    )


def run_score(settings: Score, ctx: Context) -> dict[str, float]:
    """Write rollouts.jsonl: the rollouts of one stage or several, with `score`."""
    rows = read_rollouts(ctx)
    reward = make_reward(
        settings.judge,
        ctx,
        precision=settings.precision,
        seed=settings.seed,
        cut=settings.on_long == "truncate",
    )
    readers = judge_readers(settings.judge, ctx)
    rows = fit_responses({ROLLOUTS: rows}, settings, ctx, readers, fields=["response"])[ROLLOUTS]
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
        found, said = reward.score(responses.select(index))
        # A portion is whole groups, whose rows need not be neighbours in the file.
        for row, value in zip(index, found, strict=True):
            scores[row] = value
        tokens = sum(rows[row]["num_tokens"] for row in index)
        # Of a reward that is one judge, its mean is the score.
        named = said if reward.judge.COMBINES or len(reward.labels) > 1 else {}
        parts = {f"judge/{label}": sum(given) / len(given) for label, given in named.items()}
        ctx.log(number + 1, len(portions), tokens=tokens, score=sum(found) / len(found), **parts)
    return scores


def responses_of_rows(ctx: Context, rows: list[Row]) -> Responses:
    """Rows of rollouts for a judge; the responses to one problem in one mode are a group."""
    keys = list(dict.fromkeys(map(key_of, rows)))
    number = {key: i for i, key in enumerate(keys)}
    return Responses(
        # With the messages that the model was shown.
        problems=[
            problem | pick(row, "messages")
            for problem, row in zip(problems_of(ctx, rows), rows, strict=True)
        ],
        texts=[row["response"] for row in rows],
        group=[number[key_of(row)] for row in rows],
        finished=[row["finished"] for row in rows],
        num_tokens=[row["num_tokens"] for row in rows],
        verdicts=[NAN if row["reward"] is None else row["reward"] for row in rows],
        sampled=[taken(row, "response", "response") for row in rows],
        steps=[row.get("step") for row in rows],
    )


class VerifierJudge:
    """`judges.verifier`: the domain verifier's score, 0 for a response that was cut."""

    def __init__(self, judge: Verifier, tools: StageTools) -> None:
        """A stage has what it sampled verified before it asks a judge: nothing to make here."""

    def score(self, responses: Responses) -> list[float]:
        """The scores in [0, 1] that the responses bring."""
        assert responses.verdicts is not None, "every stage verifies what it has sampled"
        return list(responses.verdicts)


class PythonJudge:
    """`judges.python`: a function of the user's own."""

    def __init__(self, judge: Python, tools: StageTools) -> None:
        self.name = judge.name
        self.pool = tools.own_judge(judge)

    def score(self, responses: Responses) -> list[float]:
        """What the function says. Raises StageError where it fails, takes too long, or reads files
        that it does not declare."""
        steps = responses.steps or [None] * len(responses)
        columns = zip(responses.num_tokens, responses.finished, steps, strict=True)
        rows = [
            {**problem, JUDGED: dict(zip(GIVEN, given, strict=True))}
            for problem, given in zip(responses.problems, columns, strict=True)
        ]
        pending = [
            self.pool.submit(self.name, [text], [row])
            for text, row in zip(responses.texts, rows, strict=True)
        ]
        scores = [found.result()[0] for found in pending]
        if self.pool.opened:
            file = self.name.rpartition(":")[0]
            raise StageError(undeclared("judges.python", file, self.pool.opened))
        return scores


class OracleJudge:
    """`judges.oracle`: what the suite's noisy annotator says."""

    def __init__(self, judge: OracleKind, tools: StageTools) -> None:
        self.annotator = tools.annotator(judge.noise)

    def score(self, responses: Responses) -> list[float]:
        """What each response is worth to it, in logits: the same response to the same problem has
        the same score every time."""
        return self.annotator.rates(responses.problems, responses.texts)

    def prefer(self, pairs: Sequence[Pair]) -> list[Preference]:
        """Which response of each pair it likes better, and how strongly."""
        answers = [self.annotator.prefer(p.problem, p.first, p.second) for p in pairs]
        # The annotator's winner is 0 for the first response, 1 for the second.
        return [Preference(first=1.0 - winner, strength=strength) for winner, strength in answers]


class ScalarJudge:
    """`judges.scalar`: a reward model. It reads the tokens that were sampled where its tokenizer is
    that of the model that sampled, and encodes the texts otherwise. A response that was cut off
    gets a stop token: a reward model has learned to score where a response ends."""

    def __init__(self, judge: Scalar, tools: StageTools) -> None:
        self.scorer = tools.ctx.scorer(judge.model, precision=tools.precision, scalar=True)
        self.squash = judge.squash
        self.limit = self.scorer.chat.max_positions if tools.cut else None

    def score(self, responses: Responses) -> list[float]:
        """Real numbers, in (0, 1) where squashed. Raises ConfigError for a row that is too long."""
        # Not kept: what a policy samples comes once, and the encodings would pile up.
        chat = self.scorer.chat.fresh()
        prompts = [chat.prompt(asked(p), p.get("mode")) for p in responses.problems]
        said = [self._said(chat, responses, row) for row in range(len(responses))]
        kept = [cut(ids, prompt, self.limit) for ids, prompt in zip(said, prompts, strict=True)]
        batch = Batch.from_tokens(prompts, kept, pad_id=chat.pad_id)
        reward_B = rewards_B(self.scorer, batch)
        scores: list[float] = (reward_B.sigmoid() if self.squash else reward_B).tolist()
        return scores

    def _said(self, fresh: Chat, responses: Responses, row: int) -> list[int]:
        """The token ids of a response; `fresh` encodes it where it must be encoded."""
        problem, text = responses.problems[row], responses.texts[row]
        sampled = {} if responses.sampled is None else responses.sampled[row]
        mode = problem.get("mode")
        kept = {**sampled, "response": text, "finished": responses.finished[row], "mode": mode}
        ids = own_ids(fresh, asked(problem), kept, "response")
        if ids is None:
            return fresh.response(asked(problem), text, mode)
        return ids if ids[-1] in fresh.stop_ids else [*ids, fresh.stop_ids[0]]


class ModelComparison:
    """`judges.compare` and `judges.itself`: a language model says which of two is better.

    It reads `question(...)` as a user message; what a wins is P(1) / (P(1) + P(2)) of the first
    token of its response, without sampling or thinking. Responses that do not fit its positions
    together lose their beginnings, the longer one first.
    """

    def __init__(self, judge: Compare | Itself, tools: StageTools) -> None:
        source = tools.policy if judge.edge is None else judge.edge
        if source is None:
            raise ConfigError(
                "judge itself: only a stage that trains a policy on rewards (rl) has one; ask a "
                "stage with judges.compare(stage)"
            )
        self.judge = judge
        self.scorer: Scorer = tools.ctx.scorer(source, precision=tools.precision)

    def score(self, responses: Responses) -> list[float]:
        """Shares in [0, 1]; 0.5 for a response that is alone in its group."""
        asked = comparisons(responses.group, pairing=self.judge.pairing, swap=self.judge.swap)
        if not asked:
            return [0.5] * len(responses)
        return win_shares(len(responses), asked, self._wins_B(responses, asked).tolist())

    def _wins_B(self, responses: Responses, asked: Sequence[tuple[int, int]]) -> Tensor:
        """What a wins in each comparison, float32 in [0, 1]."""
        scorer, chat = self.scorer, self.scorer.chat.fresh()
        first, second = verdict_ids(chat)
        prompts = [
            comparison_prompt(
                chat,
                self.judge.template,
                responses.problems[a],
                (responses.texts[a], responses.texts[b]),
            )
            for a, b in asked
        ]
        # One sampled token per row, whichever it is: the hidden state read is that before it.
        batch = Batch.from_tokens(prompts, [[first]] * len(prompts), pad_id=chat.pad_id)
        hidden_BD = scorer.hidden(batch).float()
        # The softmax over the vocabulary cancels in the ratio of two of its values.
        with torch.no_grad():
            ids = torch.tensor([first, second], device=hidden_BD.device)
            logit_B2 = hidden_BD @ scorer.head.weight_VD[ids].float().T
            if scorer.head.bias_V is not None:
                logit_B2 = logit_B2 + scorer.head.bias_V[ids].float()
            return torch.softmax(logit_B2, dim=1)[:, 0].cpu()


def comparison_prompt(
    chat: Chat,
    template: str | None,
    problem: Mapping[str, Any],
    texts: tuple[str, str],
) -> list[int]:
    """Token ids that ask which of two responses is better, and leave room for one more.

    Where they would be more than the model has positions the texts lose their beginnings, the
    longer one first.
    """
    sides, limit = list(texts), chat.max_positions
    while True:
        ids = [*chat.prompt(question(template, problem, *sides)), *verdict_opening(chat)]
        # Counted in tokens, cut in characters: with tokens of several it takes more rounds.
        excess = 0 if limit is None else len(ids) + 1 - limit
        if excess <= 0 or not any(sides):
            return ids
        longer = max((0, 1), key=lambda side: len(sides[side]))
        # No more than makes both equally long, so that neither is cut more than it must.
        gap = len(sides[longer]) - len(sides[1 - longer])
        sides[longer] = sides[longer][min(excess, max(1, gap)) :]


def verdict_ids(chat: Chat) -> tuple[int, int]:
    """The tokens in which the responses 1 and 2 begin to differ. Raises ConfigError where they are
    the same."""
    first, second = (chat.response("", verdict) for verdict in VERDICTS)
    if first == second:
        raise ConfigError(
            "judge compare: the model's tokenizer writes the verdicts 1 and 2 with one and the "
            "same token, so its preference cannot be read; use another model, or an endpoint"
        )
    shared = len(verdict_opening(chat))
    return first[shared], second[shared]


def verdict_opening(chat: Chat) -> list[int]:
    """What the responses 1 and 2 both begin with, such as the end of a thinking block that the
    prompt has opened, or a token for the beginning of a text."""
    first, second = (chat.response("", verdict) for verdict in VERDICTS)
    shared = [one == other for one, other in zip(first, second, strict=False)]
    return first[: [*shared, False].index(False)]
