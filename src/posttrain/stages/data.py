"""The rows that a training step draws from its domains: in shares, without repeats, resumable.

The order of a domain is a fresh permutation on every pass, so any step's draw can be computed
without the steps before it: that is what makes resuming exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from posttrain.backends.prompting import Problem
from posttrain.engine.errors import ConfigError
from posttrain.schedules import History
from posttrain.suites.domain import shares_problem


class DrawSettings(Protocol):
    """The settings that say what a step draws; see `posttrain.values`."""

    @property
    def seed(self) -> int: ...
    @property
    def domain_shares(self) -> Mapping[str, float]: ...
    def possible(self, name: str) -> list[Any]: ...
    def at(self, step: int, total: int, history: History) -> Any: ...


class Pool:
    """Problems of several domains, each in a fresh permutation on every pass."""

    def __init__(self, problems: Mapping[str, Sequence[Problem]], *, seed: int) -> None:
        self.problems, self.seed = problems, seed
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


class DomainShares:
    """How many rows of a batch each domain has, so that over the steps it gets its share.

    Every slot goes to the domain that is furthest behind, the first of those that tie: with even
    shares the domains take turns. No domain is ever ahead or behind by as much as one slot for each
    of the others.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._due = dict.fromkeys(names, 0.0)
        self._given = dict.fromkeys(names, 0)

    def allocate(self, count: int, shares: Mapping[str, float]) -> dict[str, int]:
        """Slots of each domain among the next `count`; `shares` is relative, empty is even."""
        weights = {name: shares.get(name, 0.0) if shares else 1.0 for name in self._due}
        total = sum(weights.values())
        drawn = [name for name, weight in weights.items() if weight > 0]
        for name in drawn:
            self._due[name] += count * weights[name] / total
        slots = dict.fromkeys(self._due, 0)
        for _ in range(count):
            name = max(drawn, key=lambda name: self._due[name] - self._given[name])
            self._given[name] += 1
            slots[name] += 1
        return slots


class Batches:
    """The rows of each step of a stage: as many, and in such shares of the domains, as it says.

    What a step draws follows from the seed and from the settings of the steps before.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Problem]],
        settings: DrawSettings,
        *,
        size: str,
        stage: str,
    ) -> None:
        """`size` names the setting that counts the rows. Raises ConfigError where `domain_shares`
        does not name the domains of `rows`."""
        self.pool, self.size = Pool(rows, seed=settings.seed), size
        self.shares = DomainShares(list(rows))
        self.drawn = dict.fromkeys(rows, 0)
        for shares in settings.possible("domain_shares"):
            problem = shares_problem(shares, list(rows))
            if problem:
                raise ConfigError(f"stage {stage!r}, field 'domain_shares': {problem}")

    def replay(self, settings: DrawSettings, done: int, total: int, history: History) -> None:
        """Pass over what the first `done` of `total` steps have drawn."""
        for step in range(done):
            self._slots(settings.at(step, total, history))

    def draw(self, step_settings: DrawSettings) -> list[Problem]:
        """The rows of the next step, domain after domain."""
        names = list(self.drawn)
        before = dict(self.drawn)
        return [
            self.pool.at(names.index(name), name, before[name] + number)
            for name, count in self._slots(step_settings).items()
            for number in range(count)
        ]

    def _slots(self, step_settings: DrawSettings) -> dict[str, int]:
        slots = self.shares.allocate(getattr(step_settings, self.size), step_settings.domain_shares)
        for name, count in slots.items():
            self.drawn[name] += count
        return slots
