"""Costs and shares of single responses and of groups, against values derived by hand."""

from __future__ import annotations

import math

import pytest

from posttrain.rewards import penalties


def test_linear_and_budget() -> None:
    assert [penalties.linear(n, budget=10) for n in (0, 10, 15, 30)] == [0, 0, 0.5, 2]
    assert [penalties.over_budget(n, budget=10) for n in (10, 11)] == [0, 1]


def test_soft_overlong_rises_over_its_cache() -> None:
    """Budget 20, cache 5: free up to 15, 1 at 20."""
    found = [penalties.soft_overlong(n, budget=20, cache=5) for n in (3, 15, 17, 20, 40)]
    assert found == pytest.approx([0, 0, 0.4, 1, 1])


def test_concave() -> None:
    """k = 3, q = 1/2, x = 1: (2 - 1) / 1.5. At q = 0 it is x itself, at q = 1 log(1 + kx) / k."""
    assert penalties.concave(10, budget=10, k=3, q=0.5) == pytest.approx(2 / 3)
    assert penalties.concave(25, budget=10, k=3, q=0) == pytest.approx(2.5)
    assert penalties.concave(10, budget=10, k=3, q=1) == pytest.approx(math.log(4) / 3)
    near = penalties.concave(10, budget=10, k=3, q=1 - 1e-6)
    assert near == pytest.approx(math.log(4) / 3, abs=1e-5)


def test_pass_rate_costs_nothing_where_nothing_is_solved() -> None:
    """Groups 0 (half solved) and 1 (unsolved), interleaved; 5, 8 and 40 of 10 tokens."""
    tokens, group, quality = [5, 8, 40, 9], [0, 1, 0, 1], [1.0, 0.0, 0.0, 0.0]
    found = penalties.length("pass_rate", tokens, group, quality, budget=10)
    assert found == pytest.approx([0.25, 0, 0.5, 0])


def test_group_relative() -> None:
    found = penalties.length("group_relative", [4, 7, 6, 7, 8], [0, 1, 0, 1, 0])
    assert found == pytest.approx([0, 0, 0.5, 0, 1])


def test_language_share_looks_at_letters_only() -> None:
    share = penalties.language_share
    assert share("The 3 cats: кот", regex="[a-zA-Z]", unit="word") == pytest.approx(2 / 3)
    assert share("ab кот 12", regex="[a-z]", unit="character") == pytest.approx(2 / 5)
    assert share("12 + 3", regex="[a-z]", unit="word") == 1


def test_format_and_repetition() -> None:
    assert penalties.has_format("<a>\n</a>", pattern="^<a>.*</a>$") == 1
    assert penalties.has_format("x<a></a>", pattern="^<a>.*</a>$") == 0
    # ab ba ab ba ab: two of five bigrams are new.
    assert penalties.repeated_share("ababab", n=2, unit="character") == pytest.approx(3 / 5)
    assert penalties.repeated_share("a b a b", n=2, unit="word") == pytest.approx(1 / 3)
    assert penalties.repeated_share("ab", n=3, unit="character") == 0
    assert penalties.repeated_share("a b a b a", n=3, unit="word") == pytest.approx(1 / 3)
    assert penalties.repeated_share("a b a b a", n=2, unit="word") == pytest.approx(1 / 2)
    assert penalties.repeated_share("a b", n=3, unit="word") == 0
