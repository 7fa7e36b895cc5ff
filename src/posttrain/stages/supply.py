"""The problems of one domain, with how often each was drawn and how often it is solved.

Legend: P problems of the domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.stages.batches import Problem
from posttrain.stages.curriculum import gaussian_keys, in_band
from posttrain.stages.settings.rl_drawing import Drawing

Row = Mapping[str, Any]


class Supply:
    """Problems to draw from. Without a curriculum the least often drawn comes first.

    Among those that were drawn equally often the order is a permutation that follows from the seed
    and that number, so with none left out each pass over the problems is a fresh permutation.
    """

    def __init__(self, problems: Sequence[Problem], *, position: int, seed: int) -> None:
        """`position` is the domain's among those of the stage."""
        self.problems, self.position, self.seed = problems, position, seed
        self.drawn_P = np.zeros(len(problems), dtype=np.int64)
        """How often each was drawn."""
        self.rate_P = np.full(len(problems), np.nan)
        """Its pass rate as far as it is known."""
        self.retired_P = np.zeros(len(problems), dtype=bool)
        self._step_P = np.zeros(len(problems), dtype=bool)
        """Drawn in this step, where draws are weighted."""
        self._ranks: dict[int, np.ndarray] = {}
        self._row = {_whole(problem): row for row, problem in enumerate(problems)}
        self._named: dict[tuple[str, str | None], list[int]] = {}
        for row, problem in enumerate(problems):
            self._named.setdefault((problem["id"], problem.get("mode")), []).append(row)
            if "mode" in problem:
                self._named.setdefault((problem["id"], None), []).append(row)

    @property
    def known(self) -> bool:
        """Whether any pass rate is known."""
        return not bool(np.isnan(self.rate_P).all())

    def open_P(self, config: Drawing) -> np.ndarray:
        """bool: the problems that a step with these settings can draw, one at least."""
        if config.curriculum == "band":
            fit_P = in_band(self.rate_P, config.band_low, config.band_high)
        elif config.curriculum == "gaussian":
            fit_P = ~np.isnan(self.rate_P)
        else:
            fit_P = np.ones(len(self.problems), dtype=bool)
        open_P: np.ndarray = fit_P & ~self.retired_P
        return open_P if open_P.any() else fit_P

    def take(
        self, config: Drawing, count: int, step: int, number: int
    ) -> tuple[list[Problem], list[float]]:
        """`count` problems for draw `number` of 0-based `step`, and their pass rates.

        None comes twice in a step, unless there are fewer.
        """
        if number == 0:
            self._step_P[:] = False
        open_P = self.open_P(config)
        key_P = None
        if config.curriculum == "gaussian":
            key_P = gaussian_keys(
                self.rate_P,
                target=config.target_rate,
                spread=config.spread,
                generator=np.random.default_rng([self.seed, self.position, step, number]),
            )
        taken: list[int] = []
        while len(taken) < count:
            if key_P is None:
                times = int(self.drawn_P[open_P].min())
                row_P = np.flatnonzero(open_P & (self.drawn_P == times))
                row_P = row_P[np.argsort(self._rank_P(times)[row_P])]
            else:
                if not (open_P & ~self._step_P).any():
                    self._step_P[:] = False
                row_P = np.flatnonzero(open_P & ~self._step_P)
                row_P = row_P[np.argsort(-key_P[row_P], kind="stable")]
            row_P = row_P[: count - len(taken)]
            self._step_P[row_P] = True
            self.drawn_P[row_P] += 1
            taken += row_P.tolist()
        return [self.problems[row] for row in taken], self.rate_P[taken].tolist()

    def some(self, count: int, *, seed: int) -> list[Problem]:
        """At most `count` problems that follow from the seed, in their own order."""
        order_P = np.random.default_rng(seed).permutation(len(self.problems))
        return [self.problems[row] for row in sorted(order_P[:count].tolist())]

    def mark(self, row: Row) -> None:
        """Count that a problem was drawn."""
        self.drawn_P[self._row[_whole(row)]] += 1

    def learn(self, row: Row, rate: float) -> None:
        """Remember the pass rate of a problem; a row without a mode speaks for all modes."""
        for found in self._named.get((row["id"], row.get("mode")), []):
            self.rate_P[found] = rate

    def retire(self, row: Row, retired: bool) -> None:
        """Draw a problem no more, or again."""
        self.retired_P[self._row[_whole(row)]] = retired

    def bring_back(self) -> None:
        """Where all are retired, draw all again."""
        if self.retired_P.all():
            self.retired_P[:] = False

    def _rank_P(self, times: int) -> np.ndarray:
        """The place of each problem in the order in which those drawn `times` times come."""
        if times not in self._ranks:
            generator = np.random.default_rng([self.seed, self.position, times])
            rank_P = np.empty(len(self.problems), dtype=np.int64)
            rank_P[generator.permutation(len(self.problems))] = np.arange(len(self.problems))
            self._ranks[times] = rank_P
        return self._ranks[times]


def _whole(row: Row) -> tuple[str, str, str | None]:
    """What tells a problem from all others, in a problem's row and in a rollout's; ids of a user's
    table may repeat."""
    return row["id"], row["prompt"], row.get("mode")
