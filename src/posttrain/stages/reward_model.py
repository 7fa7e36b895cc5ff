"""A reward model from preference pairs: Bradley-Terry, K-wise (InstructGPT), or pointwise.

The start, a language model or a reward model, gets a score in place of its logits; the reward of a
response is the score of its last token. Some prompts are held out, to say at the end how often the
chosen response of a prompt that was never seen is the one with the higher reward.

What is drawn, and counts as one, is a pair or a prompt with all of its pairs, and every response of
a draw is one row, whatever the number of its pairs. The rows of a draw are neighbours, and draws
with fewer responses than others are filled up with empty ones that no loss looks at: they cost
nothing, since their prompt is read anyway.

Legend: B rows (responses), N sampled tokens, D hidden, P pairs, K pairs that one response wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.algorithms import BradleyTerry, Pointwise, RewardLoss
from posttrain.backends.base import Head, HeadLoss, Metrics, Scorer
from posttrain.backends.chat import Chat
from posttrain.backends.prompting import asked, asked_key
from posttrain.backends.scalar import rewards_B, scores_N
from posttrain.engine.errors import ConfigError
from posttrain.engine.exact import rounded
from posttrain.losses.reward import bradley_terry, pointwise, prompt_weights
from posttrain.report.samples import Sample
from posttrain.rl.batch import Batch
from posttrain.schedules import learning_rate
from posttrain.stages.context import Context
from posttrain.stages.data import Batches
from posttrain.stages.lengths import LEARNER, Reader, cut, cut_to, fit_responses
from posttrain.stages.rows import SIDES, Pair, read_pairs
from posttrain.stages.sampled_ids import response_ids
from posttrain.stages.samples import ROWS, sample_of, spread
from posttrain.stages.settings.offline import RewardModel

DRAWS_PER_CALL = 256
"""Held-out draws that are read at once."""

Draw = dict[str, list[Pair]]
"""`{"pairs": pairs}`: what a step draws, in the form that a pool takes."""

STRENGTH_MARGINS = {4: 1.0, 3: 2 / 3, 2: 1 / 3, 1: 0.0}
"""How far apart two rewards are to be, by how much better the chosen response is: the small margins
of Llama 2 (arXiv 2307.09288, table 27)."""


def run(settings: RewardModel, ctx: Context) -> dict[str, float]:
    """Train `start` to score responses, on the pairs of its data."""
    policy = ctx.learner(settings, scalar=True)
    by_domain = read_pairs(ctx)
    margins = settings.loss.margins if isinstance(settings.loss, BradleyTerry) else "none"
    check_margins(by_domain, margins)
    readers = [Reader(name=LEARNER, chat=policy.chat)]
    by_domain = fit_responses(by_domain, settings, ctx, readers, fields=SIDES)
    limit = cut_to(settings, readers)
    kept, held = hold_out(by_domain, settings.holdout, seed=settings.seed)
    draws = draws_of(kept, per_prompt=settings.per_prompt)
    batches = Batches(draws, settings, size="batch_size", stage=ctx.name)
    num_draws = sum(map(len, draws.values()))
    steps = settings.num_steps(num_draws, settings.batch_size)
    # Held out, where there are such: of those it is not known beforehand which reward is higher.
    about = shown_pairs(held or kept)
    for step, s in ctx.steps(settings, steps, replayed=[batches], policy=policy):
        drawn = batches.draw(s)
        batch, group_rows = draw_batch(drawn, policy.chat, margins=margins, limit=limit)
        lr = learning_rate(s, step, steps)
        # Every draw counts as one: a pair, or a prompt whatever the number of its pairs.
        sums = policy.update(
            # The reward is read at the last token, which predicts nothing and so has no position.
            batch.with_end_position(),
            HeadLoss(reward_loss, s.loss),
            count=float(len(drawn)),
            lr=lr,
            group_rows=group_rows,
        )
        metrics = step_metrics(sums, batch, num_draws=len(drawn)) | {"lr": lr}
        ctx.log(step + 1, steps, tokens=batch.num_tokens, **metrics, **s.scheduled())
        if ctx.samples.due(step + 1, steps):
            scorer = ctx.scorer(policy, scalar=True)
            ctx.samples.write(step + 1, judgements(scorer, about, limit))
    policy.finish()
    policy.save(ctx.out)
    summary = {name: ctx.metrics[name] for name in ("loss", "accuracy", "margin")}
    # From the file: in float32, whatever the type in which the policy computes.
    summary |= heldout_metrics(ctx.scorer(ctx.out, scalar=True), held, limit=limit)
    return summary | {"tokens": ctx.tokens}


def shown_pairs(by_domain: Mapping[str, Sequence[Pair]]) -> list[Pair]:
    """The first pairs of each domain that are scored at every snapshot."""
    pairs = [pair for pairs in by_domain.values() for pair in pairs[:ROWS]]
    return [pairs[place] for place in spread([pair["domain"] for pair in pairs])]


def judgements(scorer: Scorer, pairs: Sequence[Pair], limit: int | None) -> list[Sample]:
    """What the model says now of both responses of a few pairs."""
    found = []
    for pair in pairs:
        batch, _ = draw_batch([{"pairs": [pair]}], scorer.chat, limit=limit)
        chosen_P, rejected_P, _ = pairs_of(batch)
        reward_B = rewards_B(scorer, batch)
        chosen, rejected = float(reward_B[chosen_P]), float(reward_B[rejected_P])
        numbers = {"reward_chosen": chosen, "reward_rejected": rejected}
        texts = {side: pair[side] for side in SIDES}
        found.append(sample_of(pair, asked(pair), texts, {**numbers, "margin": chosen - rejected}))
    return found


def reward_loss(
    loss: RewardLoss, hidden_ND: Tensor, head: Head, batch: Batch
) -> tuple[Tensor, Metrics]:
    """A `HeadLoss` of whole draws; metrics are sums over their pairs and responses.

    Columns: those of `draw_batch`.
    """
    # One per position -> one per row.
    reward_B = scores_N(hidden_ND[batch.last_B], head)
    chosen_P, rejected_P, place_P = pairs_of(batch)
    margins = isinstance(loss, BradleyTerry) and loss.margins != "none"
    total, metrics = bradley_terry(
        reward_B[chosen_P],
        reward_B[rejected_P],
        batch["pair_weight_BK"].flatten()[place_P],
        margin_P=batch["pair_margin_BK"].flatten()[place_P] if margins else None,
        centring=loss.centring if isinstance(loss, BradleyTerry) else 0.0,
    )
    metrics = {name: metrics[name] for name in ("accuracy", "margin")}
    if isinstance(loss, Pointwise):
        total, own = pointwise(reward_B, batch["label_B"], batch["label_weight_B"])
        metrics["label_accuracy"] = own["accuracy"]
    # In float64: the spread is a small difference of what these sums come to.
    filled_B = reward_B.detach()[batch["filled_B"]].double()
    metrics |= {"reward": filled_B.sum(), "reward_square": filled_B.square().sum()}
    return total, metrics | {"loss": total.detach()}


def step_metrics(sums: Mapping[str, float], batch: Batch, *, num_draws: int) -> dict[str, float]:
    """The metrics of a step, means over draws, pairs or responses, out of those sums."""
    # What fills up has a weight of 0.
    num_pairs = int((batch["pair_weight_BK"] != 0).sum())
    num_responses = int(batch["filled_B"].sum())
    metrics = {"loss": sums["loss"] / num_draws}
    metrics |= {name: sums[name] / num_pairs for name in ("accuracy", "margin")}
    if "label_accuracy" in sums:
        metrics["label_accuracy"] = sums["label_accuracy"] / num_responses
    # Rounding may leave the variance a little below 0.
    mean, square = (sums[name] / num_responses for name in ("reward", "reward_square"))
    metrics |= {"reward_mean": mean, "reward_std": math.sqrt(max(0.0, square - mean**2))}
    return metrics | {"grad_norm": sums["grad_norm"]}


def heldout_metrics(
    scorer: Scorer, held: Mapping[str, Sequence[Pair]], *, limit: int | None = None
) -> dict[str, float]:
    """How often, and by how much, the chosen response of a held-out pair has the higher reward.

    Over all pairs, and by domain where there are several. Empty without held-out pairs.
    """
    by_domain: dict[str, Tensor] = {}
    for domain, draws in draws_of(held, per_prompt=True).items():
        parts = [
            margins(scorer, draws[first : first + DRAWS_PER_CALL], limit=limit)
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


def margins(scorer: Scorer, draws: Sequence[Draw], *, limit: int | None = None) -> Tensor:
    """`margin_P`: reward of the chosen response less that of the rejected one, of each pair."""
    batch, _ = draw_batch(draws, scorer.chat, limit=limit)
    reward_B = rewards_B(scorer, batch)
    chosen_P, rejected_P, _ = pairs_of(batch)
    return reward_B[chosen_P] - reward_B[rejected_P]


def draws_of(by_domain: Mapping[str, Sequence[Pair]], *, per_prompt: bool) -> dict[str, list[Draw]]:
    """Domain to its draws: single pairs, or all pairs of a prompt together."""
    found: dict[str, list[Draw]] = {}
    for domain, pairs in by_domain.items():
        together: dict[object, list[Pair]] = {}
        for number, pair in enumerate(pairs):
            together.setdefault(_prompt(pair) if per_prompt else number, []).append(pair)
        found[domain] = [{"pairs": pairs} for pairs in together.values()]
    return found


def draw_batch(
    draws: Sequence[Draw], chat: Chat, *, margins: str = "none", limit: int | None = None
) -> tuple[Batch, int]:
    """The responses of some draws, and how many adjacent rows make up one draw. Rows of more than
    `limit` tokens lose their end.

    Columns by row:

    - `filled_B` (bool): True for a response, False for what fills up a draw.
    - `pair_loser_BK` (int64): of each pair that a response wins, how many rows further on its
      rejected response stands (further up, if negative).
    - `pair_weight_BK`, `pair_margin_BK` (float32), `pair_number_BK` (int64): its weight
      (`prompt_weights`: all pairs of a draw count together as one), the margin that is asked for
      (0 unless `margins` says where it comes from), its number in the batch. A response that wins
      fewer pairs than others has weights of 0 in place of the others.
    - `label_B`, `label_weight_B` (float32): the share of its pairs that a response wins, and 1 /
      responses of its draw, 0 for what fills up.
    """
    found = [_responses(draw) for draw in draws]
    group_rows = max(map(len, found))
    prompts: list[list[int]] = []
    responses: list[Sequence[int]] = []
    filled: list[bool] = []
    wins: list[list[tuple[int, int, float]]] = []
    pairs: list[tuple[int, int, int]] = []
    for number, (draw, texts) in enumerate(zip(draws, found, strict=True)):
        # Draws are made equally long: the learner splits a batch between blocks of `group_rows`.
        first, missing = len(prompts), group_rows - len(texts)
        places = {text: place for place, text in enumerate(texts)}
        prompt, mode = asked(draw["pairs"][0]), draw["pairs"][0].get("mode")
        prompts += [chat.prompt(prompt, mode)] * group_rows
        own = [
            cut(response_ids(chat, prompt, *said), prompts[-1], limit) for said in texts.values()
        ]
        responses += own + [[]] * missing
        filled += [True] * len(texts) + [False] * missing
        wins += [[] for _ in range(group_rows)]
        for pair in draw["pairs"]:
            chosen, rejected = (first + places[pair[side]] for side in SIDES)
            margin = margin_of(pair, margins)
            # A distance, unlike a row number, stays right when draws leave the batch.
            wins[chosen].append((len(pairs), rejected - chosen, margin))
            pairs.append((chosen, rejected, number))
    batch = Batch.from_tokens(prompts, responses, pad_id=chat.pad_id)
    batch["filled_B"] = torch.tensor(filled)
    chosen_P, rejected_P, draw_P = torch.tensor(pairs).T
    weight_P, _ = prompt_weights(draw_P)
    size = max(map(len, wins))
    # From a list of wins per row to [B, K], zeros behind the last win.
    padded = [[*won, *[(0, 0, 0.0)] * (size - len(won))] for won in wins]
    number_BK, loser_BK, margin_BK = (
        torch.tensor([[won[i] for won in row] for row in padded]) for i in range(3)
    )
    real_BK = torch.arange(size) < torch.tensor([len(won) for won in wins])[:, None]
    batch["pair_number_BK"], batch["pair_loser_BK"] = number_BK, loser_BK
    batch["pair_weight_BK"] = torch.where(real_BK, weight_P[number_BK], 0)
    batch["pair_margin_BK"] = margin_BK
    batch["label_B"], batch["label_weight_B"] = _labels(batch, chosen_P, rejected_P, group_rows)
    return batch, group_rows


def _labels(
    batch: Batch, chosen_P: Tensor, rejected_P: Tensor, group_rows: int
) -> tuple[Tensor, Tensor]:
    ones_P = torch.ones(len(chosen_P))
    won_B = torch.zeros(len(batch)).index_add(0, chosen_P, ones_P)
    met_B = won_B.index_add(0, rejected_P, ones_P)
    # From one per row to [draws, rows of a draw]; each draw adds up to 1.
    weight_DR = batch["filled_B"].float().reshape(-1, group_rows)
    weight_DR = weight_DR / weight_DR.sum(dim=1, keepdim=True)
    return won_B / met_B.clamp(min=1), weight_DR.flatten()


def pairs_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`(chosen_P, rejected_P, place_P)` of a `draw_batch`, or of whole draws of one.

    The rows of the two responses of each pair, and where the pair stands in the flat columns of
    `pair_..._BK`. In the order in which the draws were given, whatever order the draws are in now,
    so that sums over pairs have one order.
    """
    place_P = batch["pair_weight_BK"].flatten().nonzero()[:, 0]
    place_P = place_P[batch["pair_number_BK"].flatten()[place_P].argsort()]
    # A place in the flattened [B, K] -> its row.
    chosen_P = place_P // batch["pair_weight_BK"].shape[1]
    return chosen_P, chosen_P + batch["pair_loser_BK"].flatten()[place_P], place_P


def hold_out(
    by_domain: Mapping[str, Sequence[Pair]], share: float, *, seed: int
) -> tuple[dict[str, list[Pair]], dict[str, list[Pair]]]:
    """Pairs to learn from and pairs to be judged by, by domain: no prompt is in both, in no mode.

    Of each domain this share of its prompts is held out, drawn by `seed`; at least one where
    there are two, none for a share of 0. Raises ConfigError where no domain has two prompts.
    """
    kept: dict[str, list[Pair]] = {}
    held: dict[str, list[Pair]] = {}
    for position, (domain, pairs) in enumerate(by_domain.items()):
        prompts = list(dict.fromkeys(_prompt(pair)[:2] for pair in pairs))
        count = min(len(prompts) - 1, max(1, rounded(share, len(prompts)))) if share > 0 else 0
        order = np.random.default_rng([seed, position]).permutation(len(prompts))
        chosen = {prompts[place] for place in order[:count]}
        kept[domain] = [pair for pair in pairs if _prompt(pair)[:2] not in chosen]
        held[domain] = [pair for pair in pairs if _prompt(pair)[:2] in chosen]
    held = {domain: pairs for domain, pairs in held.items() if pairs}
    if share > 0 and not held:
        raise ConfigError(
            f"holdout = {share}: the pairs of each domain are all of one prompt, so that none can "
            "be held out; use more prompts, or holdout = 0"
        )
    return kept, held


def margin_of(pair: Pair, margins: str) -> float:
    """How far apart the rewards of a pair are to be."""
    if margins == "strength":
        return STRENGTH_MARGINS[pair["strength"]]
    return float(pair["margin"]) if margins == "margin" else 0.0


def check_margins(by_domain: Mapping[str, Sequence[Pair]], margins: str) -> None:
    """Raise ConfigError for pairs that do not say how much better the chosen response is, where
    that is read."""
    for pair in (pair for pairs in by_domain.values() for pair in pairs):
        if "response" in pair:
            raise ConfigError(
                "a reward model learns from pairs, and the data are single responses, desirable or "
                "not; learn from them with dpo and loss = 'kto'"
            )
        if margins == "margin" and "margin" not in pair:
            raise ConfigError(
                f"margins = margin: the pair of problem {pair['id']!r} (domain "
                f"{pair['domain']!r}) has no margin; pair by score, or use margins = none"
            )
        if margins == "strength" and pair.get("strength") not in STRENGTH_MARGINS:
            raise ConfigError(
                f"margins = strength: the pair of problem {pair['id']!r} (domain "
                f"{pair['domain']!r}) has strength = {pair.get('strength')}; it takes 1 to 4, from "
                "slightly to much better. Have the pairs judged with strengths, or use margins = "
                "none"
            )


def _responses(draw: Draw) -> dict[str, tuple[Pair, str]]:
    """The distinct responses of a draw, in the order of its pairs: each with the first pair that
    has it, and on which side."""
    found: dict[str, tuple[Pair, str]] = {}
    for pair in draw["pairs"]:
        for side in SIDES:
            found.setdefault(pair[side], (pair, side))
    return found


def _prompt(pair: Pair) -> tuple[str, Any, str | None]:
    """What makes two pairs those of one prompt: id, what is asked, and mode."""
    return pair["id"], asked_key(asked(pair)), pair.get("mode")
