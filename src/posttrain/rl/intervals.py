"""95 % intervals over problems that cover, with few problems too.

What is estimated is a mean over problems, or made of such means: differences, averages over domains
and modes, ratios. All are resampled together (`Resamples`): a resample draws problems, each with
all that was measured on it, so that models, and modes of one problem, keep what they share.

- `bootstrap`: BCa (Efron, "Better bootstrap confidence intervals", 1987), which corrects the
  percentiles for bias and skewness, widened for few problems: the plain bootstrap has the variance
  over n, not n - 1, and the quantiles of a normal distribution, not Student's (Hesterberg, "What
  teachers should know about the bootstrap", 2014, section 4.2).
- `share`: Wilson's interval (1927), of a mean of zeros and ones.
- `mean_of_shares`: of a mean of -1, 0 and 1, two shares on the same problems; Wald's interval with
  one problem more on which only the first is right and one on which only the second is (Bonett and
  Price, 2012). Of the mean over domains of such means, or of shares, the same with these problems
  (of shares two right and two wrong ones) spread over the domains (Price and Bonett, 2004).

The last two hold where a bootstrap sees no spread: 25 of 25 is not certainty.

Legend: S resamples, P rows, K problems of a domain.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Value = dict[str, float]

Measure = Literal["score", "difference", "number"]
"""What is averaged: scores, of which zeros and ones are parts of a whole; differences of two such
scores of a problem; any other number, such as a length."""

WHOLE: Mapping[Measure, frozenset[float]] = {
    "score": frozenset({0.0, 1.0}),
    "difference": frozenset({-1.0, 0.0, 1.0}),
}
"""What rows are that closed forms are for."""
NORMAL = NormalDist()
Z = NORMAL.inv_cdf(0.975)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number that follows from the problems, its value in each resample, and what it owes to
    each problem."""

    value: float
    value_S: Array
    """NaN in a resample that does not have it."""
    influence: Mapping[str, Array]
    """Domain to [K]: how much more of a problem moves the value, to first order; sums to 0."""

    def __sub__(self, other: Estimate) -> Estimate:
        return combined([(1.0, self), (-1.0, other)])

    def over(self, other: Estimate) -> Estimate:
        """The ratio; NaN in a resample in which `other` happens not to be above 0."""
        ratio = self.value / other.value
        # A resample in which the divisor happens to vanish has no ratio.
        ratio_S = np.where(
            other.value_S > 0, self.value_S / np.maximum(other.value_S, 1e-12), np.nan
        )
        linear = combined([(1 / other.value, self), (-ratio / other.value, other)])
        return Estimate(value=ratio, value_S=ratio_S, influence=linear.influence)


def combined(terms: Sequence[tuple[float, Estimate]]) -> Estimate:
    """The weighted sum; what is owed to one problem of a domain adds up."""
    influence: dict[str, Array] = {}
    for weight, term in terms:
        for domain, part_K in term.influence.items():
            influence[domain] = influence.get(domain, 0.0) + weight * part_K
    return Estimate(
        value=sum(weight * term.value for weight, term in terms),
        value_S=reduce(np.add, [weight * term.value_S for weight, term in terms]),
        influence=influence,
    )


def average(terms: Sequence[Estimate]) -> Estimate:
    """The mean of one or more estimates."""
    found = combined([(1.0, term) for term in terms])
    count = len(terms)
    return Estimate(
        value=float(np.mean([term.value for term in terms])),
        value_S=found.value_S / count,
        influence={domain: part_K / count for domain, part_K in found.influence.items()},
    )


class Resamples:
    """How often each problem is drawn in each resample, for all domains of an evaluation."""

    def __init__(
        self, problems: Mapping[str, Sequence[Hashable]], *, resamples: int, seed: int
    ) -> None:
        """`problems`: of each part, a domain or `domain/mode`, the problem of each of its rows.

        The parts of a domain share their draws: a problem is drawn with all its modes.
        """
        known: dict[str, dict[Hashable, int]] = {}
        for part, rows in problems.items():
            numbers = known.setdefault(domain_of(part), {})
            for problem in rows:
                numbers.setdefault(problem, len(numbers))
        self._weight_SK = {
            domain: resample(len(numbers), resamples, [seed, place])
            for place, (domain, numbers) in enumerate(known.items())
        }
        self._at_P = {
            part: np.array([known[domain_of(part)][problem] for problem in rows])
            for part, rows in problems.items()
        }

    def mean(self, part: str, value_P: Array) -> Estimate:
        """The mean over the rows of a part."""
        return self.ratio(part, value_P, np.ones(len(value_P)))

    def ratio(self, part: str, total_P: Array, count_P: Array) -> Estimate:
        """Sum over sum, such as of log-ratios over tokens."""
        domain, at_P = domain_of(part), self._at_P[part]
        weight_SK, num_problems = self._weight_SK[domain], self._weight_SK[domain].shape[1]
        value = float(total_P.sum() / count_P.sum())
        # [P] -> [K]: the rows of a problem together.
        total_K = np.bincount(at_P, weights=total_P, minlength=num_problems)
        count_K = np.bincount(at_P, weights=count_P, minlength=num_problems)
        drawn_S = weight_SK @ count_K
        # A problem may have no row in this part; a resample of nothing but such has no value.
        value_S = np.divide(
            weight_SK @ total_K, drawn_S, out=np.full(len(drawn_S), np.nan), where=drawn_S > 0
        )
        influence_K = (total_K - value * count_K) / count_P.sum()
        return Estimate(value=value, value_S=value_S, influence={domain: influence_K})

    def interval(self, part: str, value_P: Array, *, of: Measure) -> Value:
        """The mean over the rows of a part with its interval."""
        if not self._is_whole(part, value_P, of):
            return bootstrap(self.mean(part, value_P))
        return share(value_P) if of == "score" else mean_of_shares([value_P], of)

    def interval_of_means(self, values: Mapping[str, Array], *, of: Measure) -> Value:
        """The mean over parts of the means over their rows, with its interval."""
        if len(values) == 1:
            ((part, value_P),) = values.items()
            return self.interval(part, value_P, of=of)
        # Domains have nothing to do with each other; modes of one share their problems.
        apart = len({domain_of(part) for part in values}) == len(values)
        if apart and of in WHOLE and all(self._is_whole(p, v, of) for p, v in values.items()):
            return mean_of_shares(list(values.values()), of)
        return bootstrap(average([self.mean(part, value_P) for part, value_P in values.items()]))

    def _is_whole(self, part: str, value_P: Array, of: Measure) -> bool:
        """Whether there is a closed form for the rows of a part: they have nothing to do with each
        other, and each is right or wrong."""
        alone = len(set(self._at_P[part].tolist())) == len(value_P)
        return alone and of in WHOLE and set(np.unique(value_P).tolist()) <= WHOLE[of]


def domain_of(part: str) -> str:
    """The domain of `domain/mode`."""
    return part.partition("/")[0]


def bootstrap(estimate: Estimate) -> Value:
    """The widened BCa interval; nothing but the value where no problem moves it."""
    known_S = estimate.value_S[~np.isnan(estimate.value_S)]
    parts = [part_K for part_K in estimate.influence.values() if len(part_K) > 1]
    variance = sum(float(part_K @ part_K) for part_K in parts)
    value = estimate.value
    if variance == 0 or len(known_S) == 0:
        return {"value": value, "low": value, "high": value}
    # How much of the resamples lies below, equal ones half: 1/2 without a bias.
    below = float(np.mean(known_S < value) + np.mean(known_S == value) / 2)
    edge = 0.5 / len(known_S)
    bias = NORMAL.inv_cdf(min(max(below, edge), 1 - edge))
    acceleration = sum(float((part_K**3).sum()) for part_K in parts) / (6 * variance**1.5)
    # Of each domain the unbiased variance, and the freedom of their sum by Welch and Satterthwaite.
    unbiased = [float(part_K @ part_K) * len(part_K) / (len(part_K) - 1) for part_K in parts]
    spread = sum(u * u / (len(part_K) - 1) for u, part_K in zip(unbiased, parts, strict=True))
    reach = t_quantile(sum(unbiased) ** 2 / spread) * math.sqrt(sum(unbiased) / variance)
    shares = []
    for z in (bias - reach, bias + reach):
        # The divisor is near 1; with very few problems it could reach 0.
        shares.append(NORMAL.cdf(bias + z / max(1 - acceleration * z, 0.1)))
    low, high = np.percentile(known_S, [100 * share for share in shares])
    # Of few skewed problems the corrected ends can leave the value out.
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}


def share(value_P: Array) -> Value:
    """Wilson's interval of a mean of zeros and ones."""
    count, mean = len(value_P), float(value_P.mean())
    centre = (mean + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = math.sqrt(mean * (1 - mean) / count + (Z / (2 * count)) ** 2) * Z / (1 + Z * Z / count)
    # At 0 and 1 an end is the value itself, but for rounding.
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"value": mean, "low": min(low, mean), "high": max(high, mean)}


def mean_of_shares(values: Sequence[Array], of: Measure) -> Value:
    """Price and Bonett's interval of the mean over independent parts of means of zeros and ones, or
    of -1, 0 and 1: Wald's, with some rows more that are spread over the parts."""
    lowest, highest = min(WHOLE[of]), max(WHOLE[of])
    # So many of the lowest and of the highest value: 2 and 2 of a score, 1 and 1 of a difference.
    more = 2 / (highest - lowest) / len(values)
    centre = variance = 0.0
    for value_P in values:
        count = len(value_P) + 2 * more
        mean = (float(value_P.sum()) + more * (lowest + highest)) / count
        square = (float(value_P @ value_P) + more * (lowest**2 + highest**2)) / count
        centre += mean / len(values)
        variance += (square - mean**2) / count / len(values) ** 2
    value = float(np.mean([value_P.mean() for value_P in values]))
    low, high = centre - Z * math.sqrt(variance), centre + Z * math.sqrt(variance)
    return {
        "value": value,
        "low": min(max(lowest, low), value),
        "high": max(min(highest, high), value),
    }


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's distribution by its expansion in 1 / freedom (Abramowitz and
    Stegun 26.7.5): to four digits from 11 degrees of freedom, to 1 % from 3."""
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


def resample(num_problems: int, resamples: int, seed: list[int]) -> Array:
    """`weight_SK`: how often each problem is drawn in each resample, over the number drawn."""
    generator = np.random.default_rng(seed)
    equal = np.full(num_problems, 1 / num_problems)
    return generator.multinomial(num_problems, equal, size=resamples) / num_problems
