"""Preference pairs as tokens: read and encoded once, then batches by index without a Python loop.

Row 2 i is the chosen response of pair i and row 2 i + 1 the rejected one, so the two rows of a pair
are neighbours in every batch.

Legend: M all tokens of all rows laid end to end, B rows, T positions of a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.chat import Chat
from posttrain.engine.errors import ConfigError
from posttrain.rl.types import Rollouts
from posttrain.stages.context import Context

Pair = dict[str, Any]
Tokens = Sequence[int]


class Rows:
    """Prompts and responses as one flat tensor: no memory goes to padding until a batch is made."""

    def __init__(self, prompts: Sequence[Tokens], responses: Sequence[Tokens], pad_id: int) -> None:
        rows = chain.from_iterable(zip(prompts, responses, strict=True))
        self.tokens_M = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
        self.prompt_len_B = torch.tensor([len(prompt) for prompt in prompts])
        self.response_len_B = torch.tensor([len(response) for response in responses])
        length_B = self.prompt_len_B + self.response_len_B
        self.start_B = length_B.cumsum(0) - length_B
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.start_B)

    def batch(self, index_B: Tensor) -> Rollouts:
        """The rows at `index_B` (int64, at least one) with no sampling policy (log-prob 0)."""
        prompt_len_B, response_len_B = self.prompt_len_B[index_B], self.response_len_B[index_B]
        length_B1 = (prompt_len_B + response_len_B)[:, None]
        position_T = torch.arange(int(length_B1.max()))
        at_BT = self.start_B[index_B, None] + torch.minimum(position_T, length_B1 - 1)
        return Rollouts(
            tokens_BT=self.tokens_M[at_BT].masked_fill(position_T >= length_B1, self.pad_id),
            prompt_len_B=prompt_len_B,
            response_len_B=response_len_B,
            logp_BR=torch.zeros(len(index_B), int(response_len_B.max())),
            finished_B=torch.ones(len(index_B), dtype=torch.bool),
        )


def read_pairs(ctx: Context) -> dict[str, list[Pair]]:
    """The pairs of the `data` artifact by domain; `row` is their number over all domains."""
    found: dict[str, list[Pair]] = {}
    with (ctx.inputs["data"] / "pairs.jsonl").open(encoding="utf-8") as lines:
        for pair in map(json.loads, lines):
            found.setdefault(pair["domain"], []).append(pair)
    found = dict(sorted(found.items()))
    for number, pair in enumerate(chain.from_iterable(found.values())):
        pair["row"] = number
    return found


def encode(pairs: Sequence[Pair], chat: Chat, pad_id: int) -> Rows:
    """Two rows per pair, chosen first."""
    sides = [(pair, side) for pair in pairs for side in ("chosen", "rejected")]
    prompts = [chat.prompt(pair["prompt"], pair.get("mode")) for pair, _ in sides]
    responses = [
        chat.response(pair["prompt"], pair[side], pair.get("mode")) for pair, side in sides
    ]
    return Rows(prompts, responses, pad_id)


def encode_mismatched(pairs: Sequence[Pair], chat: Chat, pad_id: int) -> Rows:
    """The rows of `encode` with the responses of the next pair that answers another problem.

    KTO's baseline is measured on them. Raises ConfigError where all pairs answer one problem.
    """
    sides, partners = ("chosen", "rejected"), [pairs[j] for j in _next_problem(pairs)]
    return Rows(
        [chat.prompt(pair["prompt"], pair.get("mode")) for pair in pairs for _ in sides],
        [
            chat.response(pair["prompt"], pair[side], pair.get("mode"))
            for pair in partners
            for side in sides
        ],
        pad_id,
    )


def _next_problem(pairs: Sequence[Pair]) -> list[int]:
    """For every pair the first one after it, round the end, that answers another problem."""
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
    return following
