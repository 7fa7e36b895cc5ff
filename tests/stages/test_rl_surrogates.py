"""The policy-gradient family of the rl stage: every member learns, and each in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import pytest

from posttrain.algorithms import KL, Cispo, Clip, Gmpo, IcePop, Kimi, Truncated
from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config

BASE: dict[str, Any] = {
    "steps": 4,
    "prompts_per_step": 6,
    "group_size": 4,
    "max_new_tokens": 6,
    "lr": 0.05,
    "warmup_steps": 0,
    "num_minibatches": 3,
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
    "ppo": {"surrogate": Clip(0.1, 0.1)},
    "dual": {"surrogate": Clip(0.1, 0.1, dual_clip=1.01)},
    "gspo": {"surrogate": Clip(0.1, 0.1, ratio="sequence")},
    "rloo": {"surrogate": Clip(0.1, 0.1, ratio="product")},
    "cispo": {"surrogate": Cispo(clip_low=1.0, clip_high=0.1)},
    "gmpo": {"surrogate": Gmpo(0.4, 0.4)},
    "kimi": {"surrogate": "kimi", "advantage": "group_mean"},
    "kimi, tau": {"surrogate": Kimi(tau=0.1), "advantage": "group_mean"},
    "reinforce++": {"surrogate": Clip(0.1, 0.1), "advantage": "global"},
    "off-policy mask": {"surrogate": Clip(0.1, 0.1), "off_policy_delta": 0.0},
    "sequence mask": {"correction": IcePop(high=1.0, sequence=True)},
    "sequence weight": {"correction": Truncated(1.0, sequence=True)},
    "unbiased": {"kl": KL(0.5, estimator="unbiased")},
    "k3": {"kl": KL(0.5)},
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
        {"surrogate": Cispo(clip_low=1.0, clip_high=4.0)},
        {"surrogate": Gmpo(0.4, 0.4)},
        {"surrogate": Kimi(), "advantage": "group_mean", "aggregation": "sequence"},
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
        ({"tau": 2.0}, "field 'tau': unknown option"),
        ({"surrogate": {"kind": "kimi", "clip_high": 0.3}}, r"'surrogate\.clip_high': unknown"),
        ({"surrogate": {"kind": "kimi", "ratio": "sequence"}}, r"'surrogate\.ratio': unknown op"),
        ({"surrogate": {"kind": "cispo", "dual_clip": 3.0}}, r"'surrogate\.dual_clip': unknown"),
        ({"surrogate": "clp"}, "there is no 'clp'; did you mean 'clip'"),
        ({"surrogate": {"clip_high": 0.3}}, "does not say its kind; choices: clip, cispo, gmpo"),
        ({"group_size": 1}, "set group_size to 2 or more, or advantage = global"),
        (
            {"kl": {"coef": 0.1, "where": "reward", "estimator": "unbiased"}},
            "unbiased with where = reward",
        ),
        ({"surrogate": {"kind": "clip", "dual_clip": 1.0}}, r"'surrogate\.dual_clip': 1\.0 is not"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("rl", "mine", BASE | changes)
