"""rl from the nucleus: its mask is replayed where log-probs are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from posttrain.algorithms import InTurn
from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config

BASE = {
    "steps": 3,
    "prompts_per_step": 4,
    "group_size": 4,
    "max_new_tokens": 6,
    "lr": 0.02,
    "warmup_steps": 1,
    "top_p": 0.7,
}


@pytest.fixture
def rl(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    def run(threads: int = 1, **changes: Any) -> Any:
        inputs = {"start": models["start"], **domains}
        return run_stage("rl", BASE | changes, inputs, threads=threads)

    return run


def test_the_ratio_to_the_sampler_is_one_with_the_mask_only(rl: Callable[..., Any]) -> None:
    with_mask = rl(correction="truncated")
    for line in with_mask.lines:
        assert line["sampler_ratio"] == pytest.approx(1, abs=1e-4)
        assert line["nucleus_size"] >= 1
    without = rl(correction="truncated", replay_mask=False)
    for line in without.lines:
        assert line["sampler_ratio"] < 0.95


def test_top_p_and_the_mask_change_what_is_learned(
    rl: Callable[..., Any], same: Callable[..., bool]
) -> None:
    plain, nucleus, unmasked = rl(top_p=1.0), rl(), rl(replay_mask=False)
    assert "nucleus_size" not in plain.lines[0]
    assert not same(plain, nucleus)
    assert not same(nucleus, unmasked)


def test_the_reference_is_over_the_same_tokens(rl: Callable[..., Any]) -> None:
    """Before the first update the policy is its reference, over the nucleus as over all."""
    for where in ("loss", "reward"):
        for mask in (True, False):
            first = rl(kl={"coef": 0.1, "where": where}, replay_mask=mask, steps=1).lines[0]
            assert first["kl_reference"] == pytest.approx(0, abs=1e-5)


def test_threads_change_nothing(rl: Callable[..., Any], same: Callable[..., bool]) -> None:
    assert same(rl(steps=2), rl(steps=2, threads=2))


def test_more_draws_and_updates_keep_the_mask(rl: Callable[..., Any]) -> None:
    ran = rl(draw=InTurn(dynamic_sampling=2), num_minibatches=2, correction="icepop")
    assert [line["step"] for line in ran.lines] == [1, 2, 3]
    assert ran.lines[0]["ratio"] == pytest.approx(1, abs=0.2)


def test_an_empty_nucleus_is_refused() -> None:
    with pytest.raises(ConfigError, match="field 'top_p': 0"):
        build_config("rl", "policy", {"steps": 4, "top_p": 0.0})
