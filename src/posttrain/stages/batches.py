"""Which problems a step uses, as a function of the seed and the settings, and their token form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch

from posttrain.engine.errors import ConfigError
from posttrain.rl.types import Rollouts, pad_rows
from posttrain.schedules import History
from posttrain.stages.curriculum import Shares
from posttrain.suites.domain import shares_problem

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
        """`count` problems for 0-based `step`, shared out over the domains in turn.

        For steps that all draw as many; see `Batches` for others."""
        names = list(self.problems)
        drawn: list[Problem] = []
        for position, name in enumerate(names):
            # Domain d serves the global slots i with i % len(names) == d.
            first = -(-(step * count - position) // len(names))
            last = -(-((step + 1) * count - position) // len(names))
            drawn += [self.at(position, name, i) for i in range(first, last)]
        return drawn

    def at(self, position: int, name: str, index: int) -> Problem:
        """The problem at `index` in the passes over a domain, `position` among all domains."""
        rows = self.problems[name]
        epoch, offset = divmod(index, len(rows))
        key = (position, epoch)
        if key not in self._orders:
            generator = np.random.default_rng([self.seed, position, epoch])
            self._orders[key] = generator.permutation(len(rows))
        return rows[int(self._orders[key][offset])]


class Batches:
    """The rows of each step of a stage: as many, and in such shares of the domains, as it says.

    What a step draws follows from the seed and from the settings of the steps before. Where these
    do not change and no shares are given it is what `Pool.draw` gives.
    """

    def __init__(
        self, rows: Mapping[str, Sequence[Problem]], config: Drawn, *, size: str, stage: str
    ) -> None:
        """`size` names the setting that counts the rows. Raises ConfigError where `domain_shares`
        does not name the domains of `rows`."""
        self.pool, self.size = Pool(rows, seed=config.seed), size
        self.shares = Shares(list(rows))
        self.drawn = dict.fromkeys(rows, 0)
        for shares in config.possible("domain_shares"):
            problem = shares_problem(shares, list(rows))
            if problem:
                raise ConfigError(f"stage {stage!r}, field 'domain_shares': {problem}")

    def resume(self, config: Drawn, done: int, total: int, history: History) -> None:
        """Pass over what the first `done` of `total` steps have drawn."""
        config = config.only(self.size, "domain_shares")
        for step in range(done):
            self._slots(config.at(step, total, history))

    def draw(self, now: Drawn) -> list[Problem]:
        """The rows of the next step, whose settings are `now`, domain after domain."""
        names = list(self.drawn)
        before = dict(self.drawn)
        return [
            self.pool.at(names.index(name), name, before[name] + number)
            for name, count in self._slots(now).items()
            for number in range(count)
        ]

    def _slots(self, now: Drawn) -> dict[str, int]:
        slots = self.shares.allocate(getattr(now, self.size), now.domain_shares)
        for name, count in slots.items():
            self.drawn[name] += count
        return slots


class Drawn(Protocol):
    """The settings of a stage that draws; see `stages/settings/scheduled.py`."""

    @property
    def seed(self) -> int: ...
    @property
    def domain_shares(self) -> Mapping[str, float]: ...
    def possible(self, name: str) -> list[Any]: ...
    def only(self, *names: str) -> Self: ...
    def at(self, step: int, total: int, history: History) -> Self: ...


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
