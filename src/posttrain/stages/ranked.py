"""Preference pairs as a reward model reads them: every response of a prompt once, with its pairs.

What is drawn, and counts as one, is a pair, or a prompt with all of its pairs. The responses of one
draw are neighbours in a batch. Draws with fewer responses than others are filled up with empty ones
that no loss looks at: they cost nothing, since their prompt is read anyway.

Legend: B rows, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posttrain.backends.chat import Chat
from posttrain.engine.errors import ConfigError
from posttrain.rl.types import Rollouts
from posttrain.stages.preferences import Pair, Rows

Draw = dict[str, list[Pair]]
"""`{"pairs": pairs}`: what a step draws, in the form that a pool takes."""

Prompt = tuple[str, str, str | None]
"""Id, text and mode."""

STRENGTH_MARGINS = {4: 1.0, 3: 2 / 3, 2: 1 / 3, 1: 0.0}
"""How far apart two rewards are to be, by how much better the chosen response is: the small margins
of Llama 2 (arXiv 2307.09288, table 27)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The responses of some draws and their pairs."""

    rows: Rollouts
    block: int
    """Adjacent rows that belong to one draw."""
    filled_B: Tensor
    """bool, True for a response and False for what fills a block up."""
    chosen_P: Tensor
    rejected_P: Tensor
    """int64, the rows of each pair."""
    draw_P: Tensor
    """int64, the draw of each pair."""
    margin_P: Tensor


class Responses:
    """All responses of some draws as tokens, each once."""

    def __init__(self, draws: Sequence[Draw], chat: Chat, pad_id: int) -> None:
        self.number: dict[tuple[Prompt, str | None], int] = {}
        """Prompt and response -> its row; None is what fills up."""
        for pair in (pair for draw in draws for pair in draw["pairs"]):
            for text in (pair["chosen"], pair["rejected"], None):
                self.number.setdefault((_prompt(pair), text), len(self.number))
        self.rows = Rows(
            [chat.prompt(prompt, mode) for (_, prompt, mode), _ in self.number],
            [
                [] if text is None else chat.response(prompt, text, mode)
                for (_, prompt, mode), text in self.number
            ],
            pad_id,
        )

    def batch(self, draws: Sequence[Draw], *, strengths: bool) -> Batch:
        """The rows of `draws`, block after block; margins are 0 unless by `strengths`."""
        found = [self._rows(draw) for draw in draws]
        block = max(map(len, found))
        index: list[int] = []
        filled: list[bool] = []
        pairs: list[tuple[int, int, int]] = []
        margins: list[float] = []
        for number, (draw, rows) in enumerate(zip(draws, found, strict=True)):
            first, missing = len(index), block - len(rows)
            filler = self.number[_prompt(draw["pairs"][0]), None]
            index += [*rows, *[filler] * missing]
            filled += [True] * len(rows) + [False] * missing
            for pair in draw["pairs"]:
                sides = (rows.index(self._row(pair, side)) for side in ("chosen", "rejected"))
                chosen, rejected = (first + place for place in sides)
                pairs.append((chosen, rejected, number))
                margins.append(STRENGTH_MARGINS[pair["strength"]] if strengths else 0.0)
        chosen_P, rejected_P, draw_P = torch.tensor(pairs).T
        return Batch(
            rows=self.rows.batch(torch.tensor(index)),
            block=block,
            filled_B=torch.tensor(filled),
            chosen_P=chosen_P,
            rejected_P=rejected_P,
            draw_P=draw_P,
            margin_P=torch.tensor(margins),
        )

    def _rows(self, draw: Draw) -> list[int]:
        """The distinct responses of a draw, in the order of its pairs."""
        sides = ((pair, side) for pair in draw["pairs"] for side in ("chosen", "rejected"))
        return list(dict.fromkeys(self._row(pair, side) for pair, side in sides))

    def _row(self, pair: Pair, side: str) -> int:
        return self.number[_prompt(pair), pair[side]]


def draws_of(by_domain: Mapping[str, Sequence[Pair]], *, per_prompt: bool) -> dict[str, list[Draw]]:
    """Domain to its draws: single pairs, or all pairs of a prompt together."""
    found: dict[str, list[Draw]] = {}
    for domain, pairs in by_domain.items():
        together: dict[object, list[Pair]] = {}
        for number, pair in enumerate(pairs):
            together.setdefault(_prompt(pair) if per_prompt else number, []).append(pair)
        found[domain] = [{"pairs": pairs} for pairs in together.values()]
    return found


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
        prompts = list(dict.fromkeys(map(_problem, pairs)))
        count = min(len(prompts) - 1, max(1, round(share * len(prompts)))) if share > 0 else 0
        order = np.random.default_rng([seed, position]).permutation(len(prompts))
        chosen = {prompts[place] for place in order[:count]}
        kept[domain] = [pair for pair in pairs if _problem(pair) not in chosen]
        held[domain] = [pair for pair in pairs if _problem(pair) in chosen]
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


def _prompt(pair: Pair) -> Prompt:
    """What makes two pairs those of one prompt."""
    return pair["id"], pair["prompt"], pair.get("mode")


def _problem(pair: Pair) -> tuple[str, str]:
    """The same, whatever the mode."""
    return pair["id"], pair["prompt"]
