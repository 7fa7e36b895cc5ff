"""Arithmetic with the decimals that people write."""

from __future__ import annotations

import math

import pytest

from posttrain.engine.exact import below, difference, mean, rounded, rounded_up


def test_means_meet_their_decimal() -> None:
    assert mean([0.9] * 8) == 0.9
    assert sum([0.7, 0.8, 0.9]) / 3 < mean([0.7, 0.8, 0.9]) == 0.8
    # float32's .9, which older rollouts have, is another number.
    assert mean([0.8999999761581421] * 8) < 0.9
    assert mean([1, 0, 1]) == 2 / 3
    assert mean([1 / 3, 1 / 3, 1 / 3]) == 1 / 3
    assert math.isnan(mean([0.5, math.nan]))


@pytest.mark.parametrize(
    ("share", "counts", "up"),
    [
        # 0.07 * 100 is 7.000000000000001, 0.55 * 100 is 55.00000000000001, 1.1 * 30 is 33.0...04.
        (0.07, (100,), 7),
        (0.55, (100,), 55),
        (1.1, (30,), 33),
        (0.3, (10, 3), 9),
        (0.071, (100,), 8),
        (1.0, (5,), 5),
        (1e-9, (5,), 1),
    ],
)
def test_a_share_is_rounded_up_from_its_decimal(
    share: float, counts: tuple[int, ...], up: int
) -> None:
    assert rounded_up(share, *counts) == up


def test_halves_are_halves() -> None:
    """0.35 * 90 is 31.499999999999996 in floats, and 31.5 as written; 0.145 * 100 is 14.5."""
    assert rounded(0.35, 90) == 32
    assert rounded(0.145, 100) == 14
    assert rounded(0.2, 11) == 2


def test_differences_meet_their_decimal() -> None:
    assert 0.9 - 0.8 < difference(0.9, 0.8) == 0.1
    assert difference(1.0, 0.25) == 0.75
    assert difference(math.inf, 1.0) == math.inf


def test_a_computed_number_is_below_by_more_than_its_rounding() -> None:
    assert 0.7 + 0.2 < 0.9
    assert not below(0.7 + 0.2, 0.9)
    assert below(0.89999, 0.9)
    assert not below(0.9, 0.9)
    assert not below(0.91, 0.9)
