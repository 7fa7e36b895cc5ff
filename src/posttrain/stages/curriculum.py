"""The rules by which an rl stage chooses problems, as functions of numbers alone.

Legend: P problems of a domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from posttrain.schedules import plateaus
from posttrain.stages.settings.rl_drawing import Drawing

PLATEAU_GAIN = 0.01
"""Rise of the mean reward below which it counts as a plateau."""


class Shares:
    """How many problems of a batch each domain has, so that over the steps it gets its share.

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


def in_band(rate_P: np.ndarray, low: float, high: float) -> np.ndarray:
    """bool: the problems whose pass rate lies in [`low`, `high`], or those that are nearest to it
    where none does. NaN is an unknown rate; one at least must be known."""
    distance_P = np.maximum(0.0, np.maximum(low - rate_P, rate_P - high))
    nearest_P: np.ndarray = distance_P <= np.nanmin(distance_P)
    return nearest_P


def gaussian_keys(
    rate_P: np.ndarray, *, target: float, spread: float, generator: np.random.Generator
) -> np.ndarray:
    """Keys whose largest n are a draw of n problems without replacement, each in proportion to
    exp(-(rate - target)^2 / (2 spread^2)): log weights plus Gumbel noise. NaN stays NaN.

    Nemotron 3 Nano's curriculum; the noise is Kool et al., arXiv 1903.06059.
    """
    noise_P = generator.gumbel(size=len(rate_P))
    keys_P: np.ndarray = noise_P - (rate_P - target) ** 2 / (2 * spread**2)
    return keys_P


def reprofile_due(config: Drawing, step: int, reward: Sequence[float]) -> bool:
    """Whether the policy is profiled anew before 0-based `step`; `reward` is that of each step."""
    every, patience = config.reprofile_every, config.reprofile_on_plateau
    if every is not None and step > 0 and step % every == 0:
        return True
    return patience is not None and step in plateaus(
        reward[:step], patience=patience, gain=PLATEAU_GAIN
    )


def derived_seed(*words: int) -> int:
    """A seed below 2**62 for what a step samples besides its first batch."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return int(state[0]) >> 2
