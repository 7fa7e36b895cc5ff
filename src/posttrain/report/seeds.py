"""A measure over seeds: its spread, and paired differences with their t-intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A measure of one setting over its seeds."""

    values: Mapping[int, float]
    """Seed to value, of the seeds that finished."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds, of a sample (n - 1); None for one seed."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting against the first one, by the seeds that both have."""

    mean: float
    low: float | None
    """95 % t-interval over the seeds; None for one seed."""
    high: float | None
    seeds: int


def difference(first: Spread, other: Spread) -> Difference | None:
    """Mean of `other` - `first` over the seeds that both have, None where there is none.

    The interval is mean ± t s / sqrt(n), t being the 97.5 % quantile of Student's distribution
    with n - 1 degrees of freedom and s the standard deviation of the n differences.
    """
    values = [
        other.values[seed] - first.values[seed] for seed in other.values if seed in first.values
    ]
    if not values:
        return None
    mean, half = fmean(values), None
    if len(values) > 1:
        half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Difference(
        mean=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        seeds=len(values),
    )


_T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""97.5 % quantiles of Student's distribution with 1 to 10 degrees of freedom."""


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution; from 11 degrees of freedom by its expansion in
    1 / freedom (Abramowitz and Stegun 26.7.5), good to four digits there.

    >>> round(t_quantile(30), 3)
    2.042
    """
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
