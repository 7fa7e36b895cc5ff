"""A reward model from preference pairs: Bradley-Terry, K-wise (InstructGPT), or pointwise.

The start, a language model or a reward model, gets a score in place of its logits; the reward of a
response is the score of its last token. Some prompts are held out, to say at the end how often the
chosen response of a prompt that was never seen is the one with the higher reward.

Legend: B rows (responses), N flat response tokens, D hidden, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from posttrain.backends.base import Head, Metrics, MicroBatch, Scorer
from posttrain.backends.chat import Chat
from posttrain.backends.local import LocalLearner, LocalScorer
from posttrain.backends.scalar import (
    end_B,
    ended,
    load_scalar,
    rewards_B,
    save_scalar,
    scores_N,
)
from posttrain.losses.reward import bradley_terry, pointwise, prompt_weights
from posttrain.schedules import learning_rate
from posttrain.stages.batches import Batches
from posttrain.stages.context import Context
from posttrain.stages.learner import new_learner, steps_to_do
from posttrain.stages.preferences import read_pairs
from posttrain.stages.ranked import (
    Batch,
    Draw,
    Responses,
    check_strengths,
    draws_of,
    hold_out,
)
from posttrain.stages.settings.preference import RewardModel

DRAWS_PER_CALL = 256
"""Held-out draws that are read at once."""


def run(config: RewardModel, ctx: Context) -> dict[str, float]:
    """Train `start` to score responses, on the pairs of its data."""
    language_model = load_scalar(ctx.inputs["start"], device=ctx.device)
    chat, pad_id = Chat(language_model), language_model.pad_id
    by_domain = read_pairs(ctx)
    strengths = config.margins == "strength"
    if strengths:
        check_strengths(by_domain)
    kept, held = hold_out(by_domain, config.holdout, seed=config.seed)
    draws = draws_of(kept, per_prompt=config.per_prompt)
    every = list(chain.from_iterable(draws.values()))
    responses = Responses(every, chat, pad_id)
    learner = new_learner(config, language_model, ctx)
    batches = Batches(draws, config, size="batch_size", stage=ctx.name)
    steps = config.steps or math.ceil((config.epochs or 0) * len(every) / config.batch_size)
    for step, now in steps_to_do(config, ctx, learner, batches, steps):
        batch = responses.batch(batches.draw(now), strengths=strengths)
        lr = learning_rate(now, step, steps)
        metrics = learn(learner, RewardUpdate(now, batch, device=learner.device), lr=lr)
        ctx.log(step + 1, steps, tokens=batch.rows.num_tokens, **metrics, **now.scheduled())
        ctx.checkpoint(step + 1, learner)
    result = learner.result()
    save_scalar(result, ctx.out)
    summary = {name: ctx.metrics[name] for name in ("loss", "accuracy", "margin")}
    summary |= heldout_metrics(LocalScorer(result), held, chat, pad_id)
    return summary | {"tokens": ctx.tokens}


def learn(learner: LocalLearner, update: RewardUpdate, *, lr: float) -> dict[str, float]:
    """One optimiser step on a batch; returns its metrics, means over pairs or over responses."""
    batch = update.batch
    sums = learner.update(
        ended(batch.rows), update.loss, count=update.count, lr=lr, group_rows=batch.block
    )
    num_pairs, num_responses = len(batch.chosen_P), int(batch.filled_B.sum())
    metrics = {"loss": sums["loss"] / update.count}
    metrics |= {name: sums[name] / num_pairs for name in ("accuracy", "margin")}
    if "label_accuracy" in sums:
        metrics["label_accuracy"] = sums["label_accuracy"] / num_responses
    mean, square = (sums[name] / num_responses for name in ("reward", "reward_square"))
    metrics |= {"reward_mean": mean, "reward_std": math.sqrt(max(0.0, square - mean**2))}
    return metrics | {"grad_norm": sums["grad_norm"], "lr": lr}


class RewardUpdate:
    """The draws of one optimiser step with the constants of their loss, which are on `device`."""

    def __init__(self, config: RewardModel, batch: Batch, *, device: torch.device) -> None:
        self.config, self.batch = config, batch
        self.filled_B = batch.filled_B.to(device)
        self.chosen_P, self.rejected_P = batch.chosen_P.to(device), batch.rejected_P.to(device)
        self.margin_P = batch.margin_P.to(device) if config.margins == "strength" else None
        # Every draw counts as one: a pair, or a prompt whatever the number of its pairs.
        weight_P, self.count = prompt_weights(batch.draw_P)
        self.weight_P = weight_P.to(device)
        self.label_B, self.weight_B = (t.to(device) for t in labels(batch))

    def loss(self, hidden_ND: Tensor, head: Head, part: MicroBatch) -> tuple[Tensor, Metrics]:
        """The loss of whole draws; metrics are sums over their pairs and responses."""
        config, index_B = self.config, part.index_B
        reward_B = scores_N(hidden_ND[end_B(part.rollouts)], head)
        place_B = torch.full_like(self.filled_B, -1, dtype=torch.int64)
        place_B[index_B] = torch.arange(len(index_B), device=index_B.device)
        here_P = place_B[self.chosen_P] >= 0
        assert torch.equal(here_P, place_B[self.rejected_P] >= 0), "a pair was taken apart"
        total, metrics = bradley_terry(
            reward_B[place_B[self.chosen_P[here_P]]],
            reward_B[place_B[self.rejected_P[here_P]]],
            self.weight_P[here_P],
            margin_P=None if self.margin_P is None else self.margin_P[here_P],
            centring=config.centring,
        )
        metrics = {name: metrics[name] for name in ("accuracy", "margin")}
        if config.loss == "pointwise":
            total, own = pointwise(reward_B, self.label_B[index_B], self.weight_B[index_B])
            metrics["label_accuracy"] = own["accuracy"]
        filled_B = reward_B.detach()[self.filled_B[index_B]].double()
        metrics |= {"reward": filled_B.sum(), "reward_square": filled_B.square().sum()}
        return total, metrics | {"loss": total.detach()}


def labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """`(label_B, weight_B)` of the pointwise loss: the share of its pairs that a response wins,
    and 1 / responses of its draw; weight 0 for what fills up."""
    size = len(batch.rows)
    ones_P = torch.ones(len(batch.chosen_P))
    won_B = torch.zeros(size).index_add(0, batch.chosen_P, ones_P)
    met_B = won_B.index_add(0, batch.rejected_P, ones_P)
    weight_DK = batch.filled_B.float().reshape(-1, batch.block)
    weight_DK = weight_DK / weight_DK.sum(dim=1, keepdim=True)
    return won_B / met_B.clamp(min=1), weight_DK.flatten()


def heldout_metrics(
    scorer: Scorer, held: Mapping[str, Sequence[dict[str, str]]], chat: Chat, pad_id: int
) -> dict[str, float]:
    """How often, and by how much, the chosen response of a held-out pair has the higher reward.

    Over all pairs, and by domain where there are several. Empty without held-out pairs.
    """
    by_domain: dict[str, Tensor] = {}
    for domain, draws in draws_of(held, per_prompt=True).items():
        responses = Responses(draws, chat, pad_id)
        parts = [
            margins(scorer, responses, draws[first : first + DRAWS_PER_CALL])
            for first in range(0, len(draws), DRAWS_PER_CALL)
        ]
        by_domain[domain] = torch.cat(parts)
    if not by_domain:
        return {}
    margin_P = torch.cat(list(by_domain.values()))
    found = {
        "heldout_accuracy": float((margin_P > 0).float().mean()),
        "heldout_margin": float(margin_P.mean()),
        "heldout_pairs": float(len(margin_P)),
    }
    if len(by_domain) > 1:
        found |= {
            f"heldout_accuracy/{domain}": float((own_P > 0).float().mean())
            for domain, own_P in by_domain.items()
        }
    return found


def margins(scorer: Scorer, responses: Responses, draws: Sequence[Draw]) -> Tensor:
    """`margin_P`: reward of the chosen response less that of the rejected one, of each pair."""
    batch = responses.batch(draws, strengths=False)
    reward_B = rewards_B(scorer, batch.rows)
    return reward_B[batch.chosen_P] - reward_B[batch.rejected_P]
