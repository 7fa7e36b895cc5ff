"""A reward model from preference pairs: Bradley-Terry, K-wise (InstructGPT), or pointwise.

The start, a language model or a reward model, gets a score in place of its logits; the reward of a
response is the score of its last token. Some prompts are held out, to say at the end how often the
chosen response of a prompt that was never seen is the one with the higher reward.

Legend: B rows (responses), N sampled tokens, D hidden, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posttrain.algorithms import BradleyTerry, Pointwise, RewardLoss
from posttrain.backends.base import Head, HeadLoss, Metrics, Scorer
from posttrain.backends.scalar import rewards_B, scores_N
from posttrain.losses.reward import bradley_terry, pointwise
from posttrain.rl.batch import Batch
from posttrain.schedules import learning_rate
from posttrain.stages.context import Context
from posttrain.stages.data import Batches
from posttrain.stages.pair_data import (
    Draw,
    Pair,
    check_strengths,
    draw_batch,
    draws_of,
    hold_out,
    pairs_of,
    read_pairs,
)
from posttrain.stages.settings.preference import RewardModel

DRAWS_PER_CALL = 256
"""Held-out draws that are read at once."""


def run(settings: RewardModel, ctx: Context) -> dict[str, float]:
    """Train `start` to score responses, on the pairs of its data."""
    policy = ctx.learner(settings, scalar=True)
    by_domain = read_pairs(ctx)
    if isinstance(settings.loss, BradleyTerry) and settings.loss.margins == "strength":
        check_strengths(by_domain)
    kept, held = hold_out(by_domain, settings.holdout, seed=settings.seed)
    draws = draws_of(kept, per_prompt=settings.per_prompt)
    batches = Batches(draws, settings, size="batch_size", stage=ctx.name)
    num_draws = sum(map(len, draws.values()))
    steps = settings.steps or math.ceil((settings.epochs or 0) * num_draws / settings.batch_size)
    for step, s in ctx.steps(settings, steps, replayed=[batches], policy=policy):
        drawn = batches.draw(s)
        batch, group_rows = draw_batch(drawn, policy.chat)
        lr = learning_rate(s, step, steps)
        # Every draw counts as one: a pair, or a prompt whatever the number of its pairs.
        sums = policy.update(
            batch.with_end_position(),
            HeadLoss(reward_loss, s.loss),
            count=float(len(drawn)),
            lr=lr,
            group_rows=group_rows,
        )
        metrics = step_metrics(sums, batch, num_draws=len(drawn)) | {"lr": lr}
        ctx.log(step + 1, steps, tokens=batch.num_tokens, **metrics, **s.scheduled())
    policy.finish()
    policy.save(ctx.out)
    summary = {name: ctx.metrics[name] for name in ("loss", "accuracy", "margin")}
    # From the file: in float32, whatever the type in which the policy computes.
    summary |= heldout_metrics(ctx.scorer(ctx.out, scalar=True), held)
    return summary | {"tokens": ctx.tokens}


def reward_loss(
    loss: RewardLoss, hidden_ND: Tensor, head: Head, batch: Batch
) -> tuple[Tensor, Metrics]:
    """A `HeadLoss` of whole draws; metrics are sums over their pairs and responses.

    Columns: those of `draw_batch`.
    """
    reward_B = scores_N(hidden_ND[batch.last_B], head)
    chosen_P, rejected_P, place_P = pairs_of(batch)
    strengths = isinstance(loss, BradleyTerry) and loss.margins == "strength"
    total, metrics = bradley_terry(
        reward_B[chosen_P],
        reward_B[rejected_P],
        batch["pair_weight_BK"].flatten()[place_P],
        margin_P=batch["pair_margin_BK"].flatten()[place_P] if strengths else None,
        centring=loss.centring if isinstance(loss, BradleyTerry) else 0.0,
    )
    metrics = {name: metrics[name] for name in ("accuracy", "margin")}
    if isinstance(loss, Pointwise):
        total, own = pointwise(reward_B, batch["label_B"], batch["label_weight_B"])
        metrics["label_accuracy"] = own["accuracy"]
    filled_B = reward_B.detach()[batch["filled_B"]].double()
    metrics |= {"reward": filled_B.sum(), "reward_square": filled_B.square().sum()}
    return total, metrics | {"loss": total.detach()}


def step_metrics(sums: Mapping[str, float], batch: Batch, *, num_draws: int) -> dict[str, float]:
    """The metrics of a step, means over draws, pairs or responses, out of those sums."""
    num_pairs = int((batch["pair_weight_BK"] != 0).sum())
    num_responses = int(batch["filled_B"].sum())
    metrics = {"loss": sums["loss"] / num_draws}
    metrics |= {name: sums[name] / num_pairs for name in ("accuracy", "margin")}
    if "label_accuracy" in sums:
        metrics["label_accuracy"] = sums["label_accuracy"] / num_responses
    mean, square = (sums[name] / num_responses for name in ("reward", "reward_square"))
    metrics |= {"reward_mean": mean, "reward_std": math.sqrt(max(0.0, square - mean**2))}
    return metrics | {"grad_norm": sums["grad_norm"]}


def heldout_metrics(scorer: Scorer, held: Mapping[str, Sequence[Pair]]) -> dict[str, float]:
    """How often, and by how much, the chosen response of a held-out pair has the higher reward.

    Over all pairs, and by domain where there are several. Empty without held-out pairs.
    """
    by_domain: dict[str, Tensor] = {}
    for domain, draws in draws_of(held, per_prompt=True).items():
        parts = [
            margins(scorer, draws[first : first + DRAWS_PER_CALL])
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


def margins(scorer: Scorer, draws: Sequence[Draw]) -> Tensor:
    """`margin_P`: reward of the chosen response less that of the rejected one, of each pair."""
    batch, _ = draw_batch(draws, scorer.chat)
    reward_B = rewards_B(scorer, batch)
    chosen_P, rejected_P, _ = pairs_of(batch)
    return reward_B[chosen_P] - reward_B[rejected_P]
