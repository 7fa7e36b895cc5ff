"""Intervals against closed forms by hand, and how often they hold what they should."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from posttrain.rl.intervals import (
    Estimate,
    Resamples,
    average,
    bootstrap,
    mean_of_shares,
    resample,
    share,
    t_quantile,
)

Draw = Callable[[np.random.Generator, int], dict[str, float]]


def test_a_resample_draws_as_many_problems_as_there_are() -> None:
    weight_SK = resample(25, 300, [0, 0])
    assert weight_SK.shape == (300, 25)
    np.testing.assert_allclose(weight_SK.sum(axis=1), 1.0)
    np.testing.assert_allclose(weight_SK * 25, np.round(weight_SK * 25))
    # With replacement: a problem is left out of a resample with probability (24/25)^25 = 0.36.
    assert (weight_SK == 0).mean() == pytest.approx(0.36, abs=0.03)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n) with z = 1.96.
    [(0, 25, 0.0, 0.1332), (25, 25, 0.8668, 1.0), (10, 25, 0.2340, 0.5926), (1, 2, 0.0945, 0.9055)],
)
def test_wilson_by_hand(right: int, count: int, low: float, high: float) -> None:
    found = share(np.array([1.0] * right + [0.0] * (count - right)))
    expected = {"value": right / count, "low": low, "high": high}
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_difference_of_shares_by_hand() -> None:
    """Of 25 problems the first is right on 4 more and the second on 1 more: 5 and 2 of 27 with the
    two that are added, 3/27 +- 1.96 sqrt((7/27 - (3/27)^2) / 27). No difference at all: 1 and 1."""
    found = mean_of_shares([np.array([1.0] * 4 + [-1.0] + [0.0] * 20)], "difference")
    half = 1.96 * math.sqrt((7 / 27 - 1 / 81) / 27)
    expected = {"value": 3 / 25, "low": 1 / 9 - half, "high": 1 / 9 + half}
    assert found == pytest.approx(expected, abs=1e-4)
    half = 1.96 * math.sqrt(2 / 27 / 27)
    found = mean_of_shares([np.zeros(25)], "difference")
    assert found == pytest.approx({"value": 0.0, "low": -half, "high": half}, abs=1e-4)


def test_a_mean_of_shares_by_hand() -> None:
    """Domains of 4 of 5 and 10 of 10 right, each with one right and one wrong problem more: 5 of 7
    and 11 of 12. Of differences each domain has half a problem more for either side."""
    drawn = Resamples({"a": range(5), "b": range(10)}, resamples=10, seed=0)
    values = {"a": np.array([1.0] * 4 + [0.0]), "b": np.ones(10)}
    centre = (5 / 7 + 11 / 12) / 2
    half = 1.96 * math.sqrt((5 / 7 * 2 / 7 / 7 + 11 / 12 * 1 / 12 / 12) / 4)
    expected = {"value": 0.9, "low": centre - half, "high": 1.0}
    found = drawn.interval_of_means(values, of="score")
    assert found == pytest.approx(expected, abs=1e-4)
    values = {"a": np.array([1.0, 1.0, 0.0, 0.0, -1.0]), "b": np.zeros(10)}
    centre = 1 / 6 / 2
    half = 1.96 * math.sqrt(((4 / 6 - 1 / 36) / 6 + 1 / 11 / 11) / 4)
    expected = {"value": 0.1, "low": centre - half, "high": centre + half}
    found = drawn.interval_of_means(values, of="difference")
    assert found == pytest.approx(expected, abs=1e-4)


def test_students_quantiles() -> None:
    """From the tables."""
    for freedom, quantile in ((3, 3.1824), (5, 2.5706), (10, 2.2281), (24, 2.0639), (400, 1.9659)):
        assert t_quantile(freedom) == pytest.approx(quantile, rel=0.01 if freedom < 11 else 1e-4)


def test_of_a_normal_mean_the_bootstrap_is_students_interval() -> None:
    """Symmetric values: no skewness, so mean +- t s / sqrt(n), give or take the resampling."""
    half = np.abs(np.random.default_rng(0).normal(size=20))
    value_P = np.concatenate([half, -half])
    drawn = Resamples({"a": range(40)}, resamples=20000, seed=0)
    found = drawn.interval("a", value_P, of="number")
    reach = 2.0227 * value_P.std(ddof=1) / math.sqrt(40)
    assert found["low"] == pytest.approx(-reach, rel=0.04)
    assert found["high"] == pytest.approx(reach, rel=0.04)


def test_skewness_moves_both_ends() -> None:
    """Few large values: the upper end is further away than the lower one, more than percentiles
    have it."""
    value_P = np.array([0.0] * 36 + [1.0, 2.0, 2.0, 3.0])
    drawn = Resamples({"a": range(40)}, resamples=8000, seed=0)
    estimate = drawn.mean("a", value_P)
    found = bootstrap(estimate)
    low, high = np.percentile(estimate.value_S, [2.5, 97.5])
    assert found["low"] > low
    assert found["high"] > high
    assert found["high"] - 0.2 > 1.5 * (0.2 - found["low"])


def test_what_no_problem_moves_is_certain() -> None:
    drawn = Resamples({"a": range(5)}, resamples=100, seed=0)
    found = drawn.interval("a", np.full(5, 7.0), of="number")
    assert found == {"value": 7.0, "low": 7.0, "high": 7.0}


def test_influences_by_hand() -> None:
    """Means of 1, 3 and of 2, 6, which answer the same problems: of 2 and 4. Their ratio 1/2 moves
    with a problem by ((x - 2) - (y - 4) / 2) / 4 / 2: 0 for both."""
    drawn = Resamples({"a": "xy", "b": "xy"}, resamples=100, seed=0)
    first = drawn.mean("a", np.array([1.0, 3.0]))
    second = drawn.mean("a", np.array([2.0, 6.0]))
    assert first.influence["a"].tolist() == [-0.5, 0.5]
    ratio = first.over(second)
    assert ratio.value == 0.5
    assert ratio.influence["a"].tolist() == [0.0, 0.0]
    assert (second - first).influence["a"].tolist() == [-0.5, 0.5]
    # Of two domains each problem moves the mean half as much.
    other = average([first, drawn.mean("b", np.array([5.0, 5.0]))])
    assert other.value == 3.5
    assert other.influence["a"].tolist() == [-0.25, 0.25]
    assert other.influence["b"].tolist() == [0.0, 0.0]


def test_modes_of_a_problem_are_drawn_together() -> None:
    """Right in one mode on just the problems that are wrong in the other: every resample has a mean
    of 1/2, and with draws apart it would have a spread."""
    value_P = np.array([1.0, 0.0] * 10)
    drawn = Resamples({"a/think": range(20), "a/no_think": range(20)}, resamples=500, seed=0)
    found = drawn.interval_of_means({"a/think": value_P, "a/no_think": 1 - value_P}, of="score")
    assert found == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    # Rows of one part, as `best` has them, and a problem that one mode lacks.
    rows = [number for number in range(10) for _ in range(2)]
    drawn = Resamples({"a": rows}, resamples=500, seed=0)
    found = drawn.interval("a", value_P, of="score")
    assert found == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    drawn = Resamples({"a/think": range(20), "a/no_think": range(1, 20)}, resamples=500, seed=0)
    found = drawn.interval_of_means({"a/think": value_P, "a/no_think": 1 - value_P[1:]}, of="score")
    assert found["low"] <= (0.5 + 10 / 19) / 2 <= found["high"] < 0.6


def test_a_resample_without_the_value_is_left_out() -> None:
    estimate = Estimate(
        value=1.0,
        value_S=np.array([np.nan] * 50 + [0.0, 1.0, 1.0, 2.0] * 25),
        influence={"a": np.array([-0.5, 0.0, 0.5])},
    )
    found = bootstrap(estimate)
    assert (found["low"], found["high"]) == (0.0, 2.0)


def shares_of(generator: np.random.Generator, number: int) -> dict[str, float]:
    drawn = Resamples({"a": range(25)}, resamples=10, seed=number)
    return drawn.interval("a", generator.binomial(1, 0.9, 25).astype(float), of="score")


def sampled_means(generator: np.random.Generator, number: int) -> dict[str, float]:
    """The mean of four samples of hard problems: the mean of a Beta(.3, 2.7) is .1."""
    drawn = Resamples({"a": range(25)}, resamples=400, seed=number)
    value_P = generator.binomial(4, generator.beta(0.3, 2.7, 25)) / 4
    return drawn.interval("a", value_P, of="score")


def differences(generator: np.random.Generator, number: int) -> dict[str, float]:
    """Two models of .9 and .95 on 25 problems, which agree on about half of what they get wrong."""
    level_P = generator.random(25)
    other_P = np.where(generator.random(25) < 0.5, level_P, generator.random(25))
    value_P = (other_P < 0.95).astype(float) - (level_P < 0.9)
    drawn = Resamples({"a": range(25)}, resamples=10, seed=number)
    return drawn.interval("a", value_P, of="difference")


def two_modes(generator: np.random.Generator, number: int) -> dict[str, float]:
    """One difficulty for both modes of each of 50 problems."""
    level_P = generator.beta(0.5, 0.5, 50)
    rows = range(50)
    drawn = Resamples({"a/think": rows, "a/no_think": rows}, resamples=400, seed=number)
    values = {part: generator.binomial(1, level_P) * 1.0 for part in ("a/think", "a/no_think")}
    return drawn.interval_of_means(values, of="score")


def two_domains(generator: np.random.Generator, number: int) -> dict[str, float]:
    """In every third evaluation all 50 problems are right, and a resample has no spread."""
    drawn = Resamples({"a": range(25), "b": range(25)}, resamples=10, seed=number)
    values = {part: generator.binomial(1, 0.98, 25) * 1.0 for part in "ab"}
    return drawn.interval_of_means(values, of="score")


def recoveries(generator: np.random.Generator, number: int) -> dict[str, float]:
    """Init .2, student .6, teacher .8 of 25 problems: (.6 - .2) / (.8 - .2) = 2/3."""
    level_P = generator.random(25)
    drawn = Resamples({"a": range(25)}, resamples=400, seed=number)

    def model(share: float) -> Any:
        own_P = np.where(generator.random(25) < 0.5, level_P, generator.random(25))
        return drawn.mean("a", (own_P < share).astype(float))

    init, student, teacher = model(0.2), model(0.6), model(0.8)
    return bootstrap((student - init).over(teacher - init))


@pytest.mark.parametrize(
    ("draw", "truth", "least", "most"),
    [
        (shares_of, 0.9, 0.935, 0.985),
        (sampled_means, 0.1, 0.925, 0.975),
        # With two or three problems that tell the models apart it is wider than it has to be.
        (differences, 0.05, 0.935, 1.0),
        (two_modes, 0.5, 0.93, 0.975),
        (two_domains, 0.98, 0.96, 1.0),
        (recoveries, 2 / 3, 0.93, 0.975),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_intervals_cover(draw: Draw, truth: float, least: float, most: float) -> None:
    """In 95 of 100 evaluations, or nearly so: 600 of them have a standard error of .9 %. The
    percentiles of independent draws were at .83 (differences) to .93, with two modes at .89, and
    resampling two domains at .63."""
    generator = np.random.default_rng(0)
    held = [
        found["low"] - 1e-12 <= truth <= found["high"] + 1e-12
        for found in (draw(generator, number) for number in range(600))
    ]
    assert least <= np.mean(held) <= most
