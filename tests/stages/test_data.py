"""Which problems a step draws: evenly, without repeats, and as a function of (seed, step) alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from posttrain.stages.data import Pool


def problems(**sizes: int) -> dict[str, list[dict[str, Any]]]:
    return {name: [{"id": f"{name}{i}"} for i in range(size)] for name, size in sizes.items()}


def draw(pool: Pool, steps: range, count: int) -> list[str]:
    return [row["id"] for step in steps for row in pool.draw(step, count)]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
def test_domains_take_turns(count: int) -> None:
    """Any number of steps: no domain is more than one problem ahead of another."""
    pool = Pool(problems(a=50, b=50, c=50), seed=0)
    seen: Counter[str] = Counter({"a": 0, "b": 0, "c": 0})
    for step in range(20):
        drawn = draw(pool, range(step, step + 1), count)
        assert len(drawn) == count
        seen.update(name[0] for name in drawn)
        assert max(seen.values()) - min(seen.values()) <= 1


def test_a_domain_repeats_only_after_all_of_it_was_drawn() -> None:
    pool = Pool(problems(a=12), seed=1)
    ids = draw(pool, range(9), 4)
    passes = [ids[0:12], ids[12:24], ids[24:36]]
    assert [len(set(one)) for one in passes] == [12, 12, 12]
    assert passes[0] != passes[1] != passes[2]


def test_a_small_domain_goes_round_while_a_large_one_does_not() -> None:
    ids = Counter(draw(Pool(problems(small=5, large=100), seed=0), range(20), 10))
    assert all(ids[f"small{i}"] == 20 for i in range(5))
    assert sorted(ids[f"large{i}"] for i in range(100)) == [1] * 100


def test_a_draw_needs_no_draws_before_it() -> None:
    forward = Pool(problems(a=7, b=11), seed=3)
    steps = [draw(forward, range(s, s + 1), 5) for s in range(12)]
    for step in (11, 4, 7):
        assert draw(Pool(problems(a=7, b=11), seed=3), range(step, step + 1), 5) == steps[step]


def test_the_seed_orders_the_problems() -> None:
    first = draw(Pool(problems(a=40), seed=0), range(4), 5)
    assert first != draw(Pool(problems(a=40), seed=1), range(4), 5)
    # Domains of one size do not go through their problems in one order.
    both = draw(Pool(problems(a=40, b=40), seed=0), range(4), 10)
    assert [i[1:] for i in both if i[0] == "a"] != [i[1:] for i in both if i[0] == "b"]
