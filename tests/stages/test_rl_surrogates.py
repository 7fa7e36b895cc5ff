"""The policy-gradient family of the rl stage: every member learns, and each in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config

BASE: dict[str, Any] = {
    "steps": 4,
    "prompts_per_step": 6,
    "group_size": 4,
    "max_new_tokens": 6,
    "lr": 0.05,
    "warmup_steps": 0,
    "updates_per_batch": 3,
}


@pytest.fixture
def rl(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    """Run rl from `start` with BASE and the given changes."""

    def run(**changes: Any) -> Any:
        return run_stage("rl", BASE | changes, {"start": models["start"], **domains})

    return run


FAMILY: dict[str, dict[str, Any]] = {
    "ppo": {"clip_low": 0.1, "clip_high": 0.1},
    "dual": {"clip_low": 0.1, "clip_high": 0.1, "dual_clip": 1.01},
    "gspo": {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.1},
    "rloo": {"ratio": "product", "clip_low": 0.1, "clip_high": 0.1},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.1},
    "gmpo": {"surrogate": "geometric_mean", "clip_low": 0.4, "clip_high": 0.4},
    "kimi": {"surrogate": "squared", "advantage": "group_mean"},
    "kimi, tau": {"surrogate": "squared", "advantage": "group_mean", "tau": 0.1},
    "reinforce++": {"advantage": "global", "clip_low": 0.1, "clip_high": 0.1},
    "off-policy mask": {"clip_low": 0.1, "clip_high": 0.1, "off_policy_delta": 0.0},
    "sequence mask": {"correction": "sequence_icepop", "correction_high": 1.0},
    "sequence weight": {"correction": "sequence_truncated", "correction_high": 1.0},
    "unbiased": {"kl_coef": 0.5, "kl_estimator": "unbiased"},
    "k3": {"kl_coef": 0.5},
}


def test_every_member_gives_another_result(rl: Callable[..., Any], same: Any) -> None:
    results = {name: rl(**changes) for name, changes in FAMILY.items()}
    alike = [(a, b) for a, b in combinations(results, 2) if same(results[a], results[b])]
    assert alike == []
    assert any(line["off_policy_masked"] > 0 for line in results["off-policy mask"].lines)
    assert any(line["clip_dual"] > 0 for line in results["dual"].lines)


@pytest.mark.parametrize(
    "changes",
    [
        {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0},
        {"surrogate": "geometric_mean", "clip_low": 0.4, "clip_high": 0.4},
        {"surrogate": "squared", "advantage": "group_mean", "aggregation": "sequence"},
        {"advantage": "global", "group_size": 1, "prompts_per_step": 64},
    ],
    ids=["cispo", "gmpo", "kimi", "reinforce++"],
)
def test_the_reward_rises(rl: Callable[..., Any], changes: dict[str, Any]) -> None:
    ran = rl(**{"steps": 20, "prompts_per_step": 16, "lr": 0.008} | changes)
    first = sum(line["reward"] for line in ran.lines[:3]) / 3
    last = sum(line["reward"] for line in ran.lines[-3:]) / 3
    assert last > first + 0.15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": 2.0}, "tau = 2.0: it is not read with surrogate = clip"),
        ({"surrogate": "squared", "clip_high": 0.3}, "not read with surrogate = squared"),
        ({"surrogate": "squared", "ratio": "sequence"}, "not read with surrogate = squared"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "not read with surrogate = cispo"),
        ({"updates_per_batch": 1, "off_policy_delta": 0.1}, "not read with updates_per_batch = 1"),
        ({"group_size": 1}, "set group_size to 2 or more, or advantage = global"),
        ({"advantage": "global", "drop_zero_variance": False}, "not read with advantage = global"),
        (
            {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "unbiased"},
            "unbiased with kl_in = reward",
        ),
        ({"dual_clip": 1.0}, "dual_clip"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("rl", "mine", BASE | changes)
