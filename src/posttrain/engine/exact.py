"""Arithmetic with the decimals that people write, without the rounding of floats.

.9 is no float: what is stored is a little more or less, and 0.3 * 10 * 3 is not 9. Where a share of
something is counted, or a mean compared with a bound, such a difference decides. So every number
here stands for the shortest decimal that reads back as it, which is what a recipe or a verifier
said, and only a result is rounded, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

ROUNDING = 1e-9
"""More than the rounding of any sum or product of floats near 1, and less than anybody means."""


def exact(value: float) -> Fraction:
    """The number that a finite float was written as: 9/10 for 0.9.

    >>> exact(0.1) + exact(0.2) == exact(0.3)
    True
    """
    return Fraction(value) if float(value).is_integer() else Fraction(repr(float(value)))


def mean(values: Iterable[float]) -> float:
    """The float next to the exact mean of one or more numbers.

    >>> mean([0.7, 0.8, 0.9]) >= 0.8, sum([0.7, 0.8, 0.9]) / 3 >= 0.8
    (True, False)
    """
    found = [float(value) for value in values]
    if not all(math.isfinite(value) for value in found):
        return math.fsum(found) / len(found)
    if all(value.is_integer() for value in found):
        # Sums of whole numbers are exact.
        return sum(found) / len(found)
    return float(sum(map(exact, found)) / len(found))


def difference(first: float, second: float) -> float:
    """The float next to `first` - `second`: 0.9 - 0.8 is 0.1."""
    if not (math.isfinite(first) and math.isfinite(second)):
        return first - second
    return float(exact(first) - exact(second))


def rounded_up(share: float, *of: float) -> int:
    """`share` of a count, or of a product, rounded up: 0.07 of 100 is 7, not 8."""
    return math.ceil(_product(share, *of))


def rounded(share: float, *of: float) -> int:
    """`share` of a count rounded to the next whole number, a half to the even one."""
    return round(_product(share, *of))


def below(value: float, bound: float) -> bool:
    """Whether a computed number, such as a weighted sum, is less than `bound` by more than its
    rounding."""
    return value < bound - ROUNDING * max(1.0, abs(bound))


def _product(*factors: float) -> Fraction:
    return math.prod(map(exact, factors), start=Fraction(1))
