"""Shares, bands, weights and the order of draws: against values derived by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.algorithms import Gaussian, InTurn, Reprofile
from posttrain.rl.batch import Batch
from posttrain.stages.context import Context
from posttrain.stages.data import DomainShares, Pool
from posttrain.stages.problems import (
    DomainQueue,
    ProblemSampler,
    gaussian_keys,
    in_band,
    reprofile_due,
)
from posttrain.stages.rollout_log import RolloutLog
from posttrain.stages.settings.rl import Rl


def problems(count: int, name: str = "a") -> list[dict[str, Any]]:
    return [{"id": f"{name}{i}", "domain": name, "prompt": f"{name} {i}"} for i in range(count)]


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in rows]


@pytest.mark.parametrize("count", [1, 2, 5, 7, 12])
def test_without_settings_problems_are_drawn_as_from_a_pool(count: int) -> None:
    """Three domains of 4, 7 and 9 problems through several passes: the same rows in one order."""
    rows = {name: problems(size, name) for name, size in (("a", 4), ("b", 7), ("c", 9))}
    pool, shares, plain = Pool(rows, seed=3), DomainShares(list(rows)), InTurn()
    queues = {n: DomainQueue(r, position=p, seed=3) for p, (n, r) in enumerate(rows.items())}
    for step in range(20):
        slots = shares.allocate(count, {})
        drawn = [row for n, s in slots.items() for row in queues[n].draw(plain, s, step, 0)[0]]
        assert drawn == pool.draw(step, count)


def test_every_domain_gets_its_share_within_a_slot() -> None:
    shares, seen = DomainShares(["a", "b"]), Counter[str]()
    for step in range(1, 50):
        slots = shares.allocate(5, {"a": 1, "b": 2})
        assert sum(slots.values()) == 5
        seen.update(slots)
        assert abs(seen["a"] - 5 * step / 3) < 1


def test_a_domain_with_share_zero_comes_in_when_it_is_given_one() -> None:
    """The steps without it are not made up for."""
    shares = DomainShares(["a", "b"])
    for _ in range(40):
        assert shares.allocate(4, {"a": 1, "b": 0}) == {"a": 4, "b": 0}
    for _ in range(5):
        assert shares.allocate(4, {"a": 3, "b": 1}) == {"a": 3, "b": 1}


def test_a_band_has_both_ends_and_no_unknown_rate() -> None:
    rate_P = np.array([0.0, 0.25, 0.5, 0.75, np.nan])
    assert in_band(rate_P, 0.25, 0.5).tolist() == [False, True, True, False, False]


def test_where_the_band_is_empty_the_nearest_are_drawn() -> None:
    rate_P = np.array([0.0, 0.25, 0.75, 1.0, np.nan])
    assert in_band(rate_P, 0.5, 0.6).tolist() == [False, False, True, False, False]


def test_weights_are_gaussian() -> None:
    """Rates at the target and two spreads off: weights 1 and exp(-2), so the first is drawn with
    probability 1 / (1 + exp(-2)) = 0.881; four deviations of 4000 draws are 0.021."""
    generator = np.random.default_rng(0)
    rate_P = np.array([0.5, 0.9, np.nan])
    first = [
        np.nanargmax(gaussian_keys(rate_P, target=0.5, spread=0.2, generator=generator)) == 0
        for _ in range(4000)
    ]
    assert np.mean(first) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.021)


def test_a_weighted_draw_repeats_none_before_all_were_drawn() -> None:
    queue = DomainQueue(problems(6), position=0, seed=0)
    for row, rate in zip(queue.problems[:4], (0.1, 0.4, 0.5, 0.9), strict=True):
        queue.set_rate(row, rate)
    how = Gaussian()
    drawn, rates = queue.draw(how, 3, 0, 0)
    more, _ = queue.draw(how, 3, 0, 1)
    assert sorted(ids(drawn + more[:1])) == ["a0", "a1", "a2", "a3"]
    assert len(set(ids(more))) == 3
    assert len(rates) == 3 and set(rates) < {0.1, 0.4, 0.5, 0.9}
    again = DomainQueue(problems(6), position=0, seed=0)
    again.rate_P[:] = queue.rate_P
    assert again.draw(how, 3, 0, 0)[0] == drawn, "a function of seed and step"


def test_the_target_decides_what_is_drawn() -> None:
    queue = DomainQueue(problems(11), position=0, seed=0)
    for number, row in enumerate(queue.problems):
        queue.set_rate(row, number / 10)
    means = []
    for target in (0.9, 0.5, 0.1):
        how = Gaussian(target, spread=0.1)
        rates = [rate for step in range(200) for rate in queue.draw(how, 2, step, 0)[1]]
        means.append(sum(rates) / len(rates))
    assert means == pytest.approx([0.87, 0.5, 0.13], abs=0.04)


def test_retired_problems_rest_until_all_are_retired() -> None:
    queue = DomainQueue(problems(4), position=0, seed=0)
    plain = InTurn()
    first, _ = queue.draw(plain, 2, 0, 0)
    for row in first:
        queue.retire(row, True)
    queue.reset_retired()
    later = [row["id"] for step in range(1, 5) for row in queue.draw(plain, 1, step, 0)[0]]
    assert set(later) == {"a0", "a1", "a2", "a3"} - set(ids(first))
    for row in queue.problems:
        queue.retire(row, True)
    queue.reset_retired()
    assert not queue.retired_P.any()
    back, _ = queue.draw(plain, 2, 5, 0)
    assert set(ids(back)) == set(ids(first)), "drawn least often so far"


def test_rates_go_by_id_and_mode() -> None:
    rows = [row | {"mode": mode} for row in problems(1) for mode in ("think", "no_think")]
    queue = DomainQueue(rows, position=0, seed=0)
    assert not queue.known
    queue.set_rate({"id": "a0"}, 0.25)
    assert queue.rate_P.tolist() == [0.25, 0.25]
    queue.set_rate({"id": "a0", "mode": "no_think"}, 0.5)
    assert queue.rate_P.tolist() == [0.25, 0.5]
    queue.set_rate({"id": "elsewhere"}, 1.0)
    assert queue.rate_P.tolist() == [0.25, 0.5]


def test_when_the_policy_is_profiled_anew() -> None:
    """Every third step; and with a patience of 2 where the mean of two rewards is not 0.01 above
    that of the two before: 0.3, 0.3 after 0, 0.3 has risen, 0.3, 0.3 after it has not."""
    every = Reprofile(every=3)
    assert [step for step in range(8) if reprofile_due(every, step, [0.0] * 8)] == [3, 6]
    reward = [0.0] + [0.3] * 8
    plateau = Reprofile(on_plateau=2)
    assert [step for step in range(10) if reprofile_due(plateau, step, reward)] == [5, 9]
    both = Reprofile(every=4, on_plateau=2)
    assert [step for step in range(10) if reprofile_due(both, step, reward)] == [4, 5, 8, 9]


Row = tuple[str, list[int], float]
FIRST: list[Row] = [
    ("short", [1], 1.0),
    ("short", [2], 1.0),
    ("words", [3], 0.0),
    ("words", [4], 1.0),
]
SECOND: list[Row] = [
    ("short", [5, 6, 7], 0.0),
    ("short", [8], 0.5),
    ("words", [1, 1], 0.0),
    ("words", [2], 0.0),
]


def drawn(rows: list[Row]) -> Batch:
    """Groups of two rows of (domain, response, reward)."""
    responses = [response for _, response, _ in rows]
    batch = Batch.from_tokens([[9]] * len(rows), responses, pad_id=0)
    batch.problems.extend({"domain": domain} for domain, _, _ in rows)
    batch["group_B"] = torch.arange(len(rows) // 2).repeat_interleave(2)
    batch["reward_B"] = torch.tensor([reward for _, _, reward in rows])
    return batch


def test_groups_with_unequal_rewards_come_first_and_domains_keep_their_share(
    tmp_path: Path, domains: Mapping[str, str]
) -> None:
    ctx = Context(name="rl", work=tmp_path, inputs=domains, threads=1)
    rows = {name: ctx.problems(name, "train") for name in ctx.domains}
    problems = ProblemSampler(Rl(steps=1), ctx, RolloutLog(ctx.out), rows)
    s = Rl(steps=1, group_size=2, prompts_per_step=2, draw=InTurn(dynamic_sampling=1))
    assert len(problems.draw(s, 0, [])) == 2
    first = drawn(FIRST)
    assert problems.batch(s, [first]) is first
    # The group of `short` has equal rewards, that of `words` has not.
    assert [problem["domain"] for problem in problems.draw(s, 0, [first])] == ["short"]
    chosen = problems.batch(s, [first, drawn(SECOND)])
    assert chosen.responses() == [[3], [4], [5, 6, 7], [8]]
    assert chosen["group_B"].tolist() == [1, 1, 2, 2]

    s = Rl(steps=1, group_size=2, prompts_per_step=3, domain_shares={"short": 1, "words": 2})
    assert len(problems.draw(s, 1, [])) == 3 and problems.wanted == {"short": 1, "words": 2}
    filled = problems.batch(s, [first, drawn(SECOND)])
    assert filled.responses() == [[3], [4], [5, 6, 7], [8], [1, 1], [2]]
    assert filled["reward_B"].tolist() == [0.0, 1.0, 0.0, 0.5, 0.0, 0.0]
