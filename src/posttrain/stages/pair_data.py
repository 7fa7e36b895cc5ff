"""Preference pairs as batches: the two responses of each pair, or all responses of each prompt.

`pair_batch` is for losses of single pairs: row 2 i is the chosen response of pair i and row 2 i + 1
the rejected one. `draw_batch` is for reward models: what is drawn, and counts as one, is a pair or
a prompt with all of its pairs, and every response of a draw is one row, whatever the number of its
pairs. The rows of a draw are neighbours, and draws with fewer responses than others are filled up
with empty ones that no loss looks at: they cost nothing, since their prompt is read anyway.

Legend: B rows, P pairs, K pairs that one response wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.backends.chat import Chat
from posttrain.engine.errors import ConfigError
from posttrain.engine.jsonl import read_jsonl
from posttrain.losses.reward import prompt_weights
from posttrain.rl.batch import Batch
from posttrain.stages.context import Context

Pair = dict[str, Any]

Draw = dict[str, list[Pair]]
"""`{"pairs": pairs}`: what a step draws, in the form that a pool takes."""

SIDES = ("chosen", "rejected")

STRENGTH_MARGINS = {4: 1.0, 3: 2 / 3, 2: 1 / 3, 1: 0.0}
"""How far apart two rewards are to be, by how much better the chosen response is: the small margins
of Llama 2 (arXiv 2307.09288, table 27)."""


def read_pairs(ctx: Context) -> dict[str, list[Pair]]:
    """The pairs of the `data` artifact by domain; `row` is their number over all domains."""
    found: dict[str, list[Pair]] = {}
    for pair in read_jsonl(ctx.inputs["data"] / "pairs.jsonl"):
        found.setdefault(pair["domain"], []).append(pair)
    found = dict(sorted(found.items()))
    for number, pair in enumerate(chain.from_iterable(found.values())):
        pair["row"] = number
    return found


def pair_batch(pairs: Sequence[Pair], chat: Chat, answers: Sequence[Pair] | None = None) -> Batch:
    """Two rows for each pair, chosen first. `answers` are pairs whose responses stand in place of
    the pairs' own."""
    prompts, responses = [], []
    for pair, answer in zip(pairs, pairs if answers is None else answers, strict=True):
        for side in SIDES:
            prompts.append(chat.prompt(pair["prompt"], pair.get("mode")))
            responses.append(chat.response(answer["prompt"], answer[side], answer.get("mode")))
    return Batch.from_tokens(prompts, responses, pad_id=chat.pad_id)


def mismatched(pairs: Sequence[Pair]) -> list[Pair]:
    """For every pair the first one after it, round the end, that answers another problem.

    KTO's baseline is measured on the responses of these. Raises ConfigError where all pairs answer
    one problem.
    """
    keys = [(pair["domain"], pair["id"]) for pair in pairs]
    if len(set(keys)) < 2:
        raise ConfigError(
            "loss = 'kto' needs pairs of two problems at least: its baseline is measured on "
            "responses to other prompts; use more problems, or another loss"
        )
    # Twice around, from the back: what follows a pair of the same problem follows this one too.
    following: list[int] = [0] * len(keys)
    for place in range(2 * len(keys) - 2, -1, -1):
        here, after = place % len(keys), (place + 1) % len(keys)
        following[here] = following[after] if keys[here] == keys[after] else after
    return [pairs[number] for number in following]


def draws_of(by_domain: Mapping[str, Sequence[Pair]], *, per_prompt: bool) -> dict[str, list[Draw]]:
    """Domain to its draws: single pairs, or all pairs of a prompt together."""
    found: dict[str, list[Draw]] = {}
    for domain, pairs in by_domain.items():
        together: dict[object, list[Pair]] = {}
        for number, pair in enumerate(pairs):
            together.setdefault(_prompt(pair) if per_prompt else number, []).append(pair)
        found[domain] = [{"pairs": pairs} for pairs in together.values()]
    return found


def draw_batch(draws: Sequence[Draw], chat: Chat) -> tuple[Batch, int]:
    """The responses of some draws, and how many adjacent rows make up one draw.

    Columns by row:

    - `filled_B` (bool): True for a response, False for what fills up a draw.
    - `pair_loser_BK` (int64): of each pair that a response wins, how many rows further on its
      rejected response stands (further up, if negative).
    - `pair_weight_BK`, `pair_margin_BK` (float32), `pair_number_BK` (int64): its weight
      (`prompt_weights`: all pairs of a draw count together as one), the margin that its strength
      asks for (0 without one), its number in the batch. A response that wins fewer pairs than
      others has weights of 0 in place of the others.
    - `label_B`, `label_weight_B` (float32): the share of its pairs that a response wins, and 1 /
      responses of its draw, 0 for what fills up.
    """
    found = [_responses(draw) for draw in draws]
    group_rows = max(map(len, found))
    prompts: list[list[int]] = []
    responses: list[list[int]] = []
    filled: list[bool] = []
    wins: list[list[tuple[int, int, float]]] = []
    pairs: list[tuple[int, int, int]] = []
    for number, (draw, texts) in enumerate(zip(draws, found, strict=True)):
        first, missing = len(prompts), group_rows - len(texts)
        _, prompt, mode = _prompt(draw["pairs"][0])
        prompts += [chat.prompt(prompt, mode)] * group_rows
        responses += [chat.response(prompt, text, mode) for text in texts] + [[]] * missing
        filled += [True] * len(texts) + [False] * missing
        wins += [[] for _ in range(group_rows)]
        for pair in draw["pairs"]:
            chosen, rejected = (first + texts.index(pair[side]) for side in SIDES)
            margin = STRENGTH_MARGINS.get(pair.get("strength", 1), 0.0)
            wins[chosen].append((len(pairs), rejected - chosen, margin))
            pairs.append((chosen, rejected, number))
    batch = Batch.from_tokens(prompts, responses, pad_id=chat.pad_id)
    batch["filled_B"] = torch.tensor(filled)
    chosen_P, rejected_P, draw_P = torch.tensor(pairs).T
    weight_P, _ = prompt_weights(draw_P)
    size = max(map(len, wins))
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
        count = min(len(prompts) - 1, max(1, round(share * len(prompts)))) if share > 0 else 0
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


def check_strengths(by_domain: Mapping[str, Sequence[Pair]]) -> None:
    """Raise ConfigError for pairs that do not say how much better the chosen response is."""
    for pair in (pair for pairs in by_domain.values() for pair in pairs):
        if pair.get("strength") not in STRENGTH_MARGINS:
            raise ConfigError(
                f"margins = strength: the pair of problem {pair['id']!r} (domain "
                f"{pair['domain']!r}) has strength = {pair.get('strength')}; it takes 1 to 4, from "
                "slightly to much better. Have the pairs judged with strengths, or use margins = "
                "none"
            )


def _responses(draw: Draw) -> list[str]:
    """The distinct responses of a draw, in the order of its pairs."""
    return list(dict.fromkeys(pair[side] for pair in draw["pairs"] for side in SIDES))


def _prompt(pair: Pair) -> tuple[str, str, str | None]:
    """What makes two pairs those of one prompt: id, text and mode."""
    return pair["id"], pair["prompt"], pair.get("mode")
