"""Judges that need the stage: its verifiers, its models, its work directory.

    panel = make_judge(config.reward, ctx, policy=learner.policy, verifiers=pool)   # once
    scores = panel.score(batch, at)                                                 # every step

with `at = lambda schedule: schedule.at(step, total, history)`. `batch_of(scored)` makes the
batch of a stage that samples.

Legend: B rows (comparisons or responses), N flat response tokens (one per row here), D hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel, load
from posttrain.backends.local import POSITIONS, LocalScorer
from posttrain.backends.scalar import load_scalar, rewards_B
from posttrain.engine.errors import ConfigError
from posttrain.rewards.comparisons import VERDICTS, question
from posttrain.rewards.endpoint import Endpoint, ReplyCache
from posttrain.rewards.grading import EndpointComparison, Grader
from posttrain.rewards.judging import Batch, Judge, Panel, leaves
from posttrain.rewards.oracle import Oracle
from posttrain.rewards.pairing import Comparison, comparisons, win_shares
from posttrain.rewards.people import People
from posttrain.rewards.pool import VerifierPool
from posttrain.rl.types import Rollouts, pad_rows
from posttrain.stages.context import Context
from posttrain.stages.rollouts import MAX_WORKERS, Scored, submit

REPLIES = "replies.jsonl"
"""In the work directory: what endpoints have answered."""


def make_judge(
    spec: Mapping[str, Any],
    ctx: Context,
    *,
    policy: LanguageModel | None = None,
    verifiers: VerifierPool | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Panel:
    """A judge in its JSON form, ready to be asked; models are loaded once, from `ctx.inputs`.

    `policy` is what `judges.itself` asks, with the weights that it has at the time; `verifiers` are
    read where a batch brings no verdicts; `seed` is the oracle's. Raises ConfigError where the spec
    needs what is not given, and what loading a model raises.
    """
    cache = ReplyCache(ctx.work / REPLIES)

    def endpoint(leaf: Mapping[str, Any]) -> Endpoint:
        return Endpoint(url=leaf["url"], model=leaf["model"], key=leaf["key"], cache=cache)

    def model(leaf: Mapping[str, Any]) -> LanguageModel:
        return load(ctx.inputs[leaf["model"]], dtype=dtype, device=ctx.device)

    make: dict[str, Callable[[Mapping[str, Any]], Judge]] = {
        "verifier": lambda leaf: Verdicts(verifiers),
        "oracle": lambda leaf: Opinion(oracle(ctx, leaf["noise"], seed)),
        "scalar": lambda leaf: Scalar(
            load_scalar(ctx.inputs[leaf["model"]], dtype=dtype, device=ctx.device), leaf["squash"]
        ),
        "compare": lambda leaf: ModelComparison(leaf, model(leaf)),
        "itself": lambda leaf: ModelComparison(leaf, policy),
        "llm": lambda leaf: Grader(leaf, endpoint(leaf)),
        "compare_endpoint": lambda leaf: EndpointComparison(leaf, endpoint(leaf)),
        "human": lambda leaf: People(leaf, ctx.work, ctx.out),
    }
    return Panel(spec, {key: make[leaf["judge"]](leaf) for key, leaf in leaves(spec).items()})


def batch_of(scored: Scored) -> Batch:
    """What a stage has sampled, with the verifier's verdicts, as a batch for judges."""
    return Batch(
        problems=scored.problems,
        texts=scored.texts,
        group=scored.group_B.tolist(),
        finished=scored.rollouts.finished_B.tolist(),
        num_tokens=scored.rollouts.response_len_B.tolist(),
        verdicts=scored.verified_B.tolist(),
    )


class Verdicts:
    """`judges.verifier`: the domain verifier's score, 0 for a response that was cut."""

    def __init__(self, verifiers: VerifierPool | None) -> None:
        self.verifiers = verifiers

    def score(self, batch: Batch) -> list[float]:
        """Scores in [0, 1]; those that the batch brings, or the verifiers'."""
        if batch.verdicts is not None:
            return list(batch.verdicts)
        assert self.verifiers is not None, "a batch without verdicts needs verifiers"
        ended = [row for row, whole in enumerate(batch.finished) if whole]
        problems = [dict(problem) for problem in batch.problems]
        scores = [0.0] * len(batch)
        for rows, found in submit(self.verifiers, ended, batch.texts, problems):
            for row, value in zip(rows, found.result(), strict=True):
                scores[row] = value
        return scores


def oracle(ctx: Context, noise: float, seed: int) -> Oracle:
    """The noisy annotator of the stage's domains; its workers end with the stage."""
    workers = min(ctx.threads, MAX_WORKERS)
    pool = VerifierPool(ctx.domains, num_workers=workers, oracle=True)
    return Oracle(qualities=ctx.resources.enter_context(pool).scores, noise=noise, seed=seed)


class Opinion:
    """`judges.oracle`: what each response is worth to the noisy annotator, in logits."""

    def __init__(self, annotator: Oracle) -> None:
        self.annotator = annotator

    def score(self, batch: Batch) -> list[float]:
        """Real numbers; the same response to the same problem has the same one every time."""
        return self.annotator.rates(batch.problems, batch.texts)


class Scalar:
    """`judges.scalar`: a reward model, which reads the texts through its own tokenizer."""

    def __init__(self, language_model: LanguageModel, squash: bool) -> None:
        self.language_model = language_model
        self.squash = squash

    def score(self, batch: Batch) -> list[float]:
        """Real numbers, in (0, 1) where squashed. Raises ConfigError for a row that is too long."""
        # Not kept: what a policy samples comes once, and the encodings would pile up.
        chat = Chat(self.language_model)
        rows = list(zip(batch.problems, batch.texts, strict=True))
        prompts = [chat.prompt(p["prompt"], p.get("mode")) for p, _ in rows]
        responses = [chat.response(p["prompt"], text, p.get("mode")) for p, text in rows]
        rollouts = rollouts_of(prompts, responses, self.language_model.pad_id)
        reward_B = rewards_B(LocalScorer(self.language_model), rollouts)
        scores: list[float] = (reward_B.sigmoid() if self.squash else reward_B).tolist()
        return scores


class ModelComparison:
    """`judges.compare` and `judges.itself`: a language model says which of two is better.

    It reads `question(...)` as a user message; what a wins is P(1) / (P(1) + P(2)) of the first
    token of its response, without sampling. Responses that do not fit its positions together lose
    their beginnings, the longer one first.
    """

    def __init__(self, spec: Mapping[str, Any], language_model: LanguageModel | None) -> None:
        if language_model is None:
            raise ConfigError(
                "judge itself: only a stage that trains a policy on rewards (rl) has one; ask a "
                "stage with judges.compare(stage)"
            )
        self.spec = spec
        self.language_model = language_model

    def score(self, batch: Batch) -> list[float]:
        """Shares in [0, 1]; 0.5 for a response that is alone in its group."""
        asked = comparisons(batch.group, pairing=self.spec["pairing"], swap=self.spec["swap"])
        if not asked:
            return [0.5] * len(batch)
        return win_shares(len(batch), asked, self._wins_B(batch, asked).tolist())

    def _wins_B(self, batch: Batch, asked: Sequence[Comparison]) -> Tensor:
        """What a wins in each comparison, float32 in [0, 1]."""
        chat = Chat(self.language_model)
        first, second = verdict_ids(chat)
        limit = positions_of(self.language_model)
        prompts = [
            comparison_prompt(
                chat,
                limit,
                self.spec["template"],
                batch.problems[pair.a],
                (batch.texts[pair.a], batch.texts[pair.b]),
            )
            for pair in asked
        ]
        rollouts = rollouts_of(prompts, [[first]] * len(prompts), self.language_model.pad_id)
        scorer = LocalScorer(self.language_model)
        hidden_BD = scorer.hidden(rollouts).float()
        # The softmax over the vocabulary cancels in the ratio of two of its values.
        with torch.no_grad():
            ids = torch.tensor([first, second], device=hidden_BD.device)
            logit_B2 = hidden_BD @ scorer.head.weight_VD[ids].float().T
            if scorer.head.bias_V is not None:
                logit_B2 = logit_B2 + scorer.head.bias_V[ids].float()
            return torch.softmax(logit_B2, dim=1)[:, 0].cpu()


def comparison_prompt(
    chat: Chat,
    limit: int | None,
    template: str | None,
    problem: Mapping[str, Any],
    texts: tuple[str, str],
) -> list[int]:
    """Token ids that ask which of two responses is better, and leave room for one more.

    Where they would be more than `limit` the texts lose their beginnings, the longer one first.
    """
    sides = list(texts)
    while True:
        ids = chat.prompt(question(template, problem, *sides))
        excess = 0 if limit is None else len(ids) + 1 - limit
        if excess <= 0 or not any(sides):
            return ids
        longer = max((0, 1), key=lambda side: len(sides[side]))
        # No more than makes both equally long, so that neither is cut more than it must.
        gap = len(sides[longer]) - len(sides[1 - longer])
        sides[longer] = sides[longer][min(excess, max(1, gap)) :]


def positions_of(language_model: LanguageModel) -> int | None:
    """Tokens of the longest row that the model can read, None where it has no such limit."""
    limit: int | None = getattr(language_model.model.config, POSITIONS, None)
    return limit


def verdict_ids(chat: Chat) -> tuple[int, int]:
    """The first tokens of the responses 1 and 2. Raises ConfigError where they are the same."""
    first, second = (chat.response("", verdict)[0] for verdict in VERDICTS)
    if first == second:
        raise ConfigError(
            "judge compare: the model's tokenizer begins the verdicts 1 and 2 with one and the "
            "same token, so its preference cannot be read; use another model, or an endpoint"
        )
    return first, second


def rollouts_of(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> Rollouts:
    """Token ids as rollouts of no sampling policy (log-prob 0)."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    tokens_BT, _ = pad_rows(rows, pad_id)
    length_B = torch.tensor([len(response) for response in responses])
    return Rollouts(
        tokens_BT=tokens_BT,
        prompt_len_B=torch.tensor([len(prompt) for prompt in prompts]),
        response_len_B=length_B,
        logp_BR=torch.zeros(len(rows), int(length_B.max())),
        finished_B=torch.ones(len(rows), dtype=torch.bool),
    )
