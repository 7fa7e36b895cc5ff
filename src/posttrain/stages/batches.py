"""Which problems a step uses, as a pure function of (seed, step), and their token form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from posttrain.rl.types import Rollouts, pad_rows

Problem = dict[str, Any]


def kept(row: Mapping[str, Any], *fields: str) -> dict[str, Any]:
    """The named fields of a row, as far as it has them."""
    return {field: row[field] for field in fields if field in row}


class Pool:
    """Problems of several domains, drawn evenly and without repeats until a domain is used up.

    The order of a domain is a fresh permutation on every pass, so any step's draw can be computed
    without the steps before it: that is what makes resuming exact.
    """

    def __init__(self, problems: Mapping[str, Sequence[Problem]], *, seed: int) -> None:
        self.problems = problems
        self.seed = seed
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def draw(self, step: int, count: int) -> list[Problem]:
        """`count` problems for 0-based `step`, shared out over the domains in turn."""
        names = list(self.problems)
        drawn: list[Problem] = []
        for position, name in enumerate(names):
            # Domain d serves the global slots i with i % len(names) == d.
            first = -(-(step * count - position) // len(names))
            last = -(-((step + 1) * count - position) // len(names))
            drawn += [self._at(position, name, i) for i in range(first, last)]
        return drawn

    def _at(self, position: int, name: str, index: int) -> Problem:
        rows = self.problems[name]
        epoch, offset = divmod(index, len(rows))
        key = (position, epoch)
        if key not in self._orders:
            generator = np.random.default_rng([self.seed, position, epoch])
            self._orders[key] = generator.permutation(len(rows))
        return rows[int(self._orders[key][offset])]


def sequences(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> Rollouts:
    """Given prompts and responses as a batch of rollouts with no sampling policy (log-prob 0)."""
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    tokens_BT, _ = pad_rows(rows, pad_id)
    response_len_B = torch.tensor([len(r) for r in responses])
    return Rollouts(
        tokens_BT=tokens_BT,
        prompt_len_B=torch.tensor([len(p) for p in prompts]),
        response_len_B=response_len_B,
        logp_BR=torch.zeros(len(rows), int(response_len_B.max())),
        finished_B=torch.ones(len(rows), dtype=torch.bool),
    )
