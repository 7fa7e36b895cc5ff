"""Schedules, reference resets, per-domain KL and the rollouts that an rl stage leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain import schedules
from posttrain.algorithms import KL, Clip
from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config
from posttrain.stages.rollout_log import RolloutLog

BASE: dict[str, Any] = {
    "steps": 6,
    "prompts_per_step": 6,
    "group_size": 4,
    "max_new_tokens": 6,
    "lr": 0.02,
    "warmup_steps": 1,
}


@pytest.fixture
def rl(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    """Run rl from `start` with BASE and the given changes."""

    def run(**changes: Any) -> Any:
        return run_stage("rl", BASE | changes, {"start": models["start"], **domains})

    return run


def rows_of(ran: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ran.out / "rollouts.jsonl").read_text().splitlines()]


def test_a_constant_schedule_is_the_constant(rl: Callable[..., Any], same: Any) -> None:
    constant = rl(temperature=schedules.steps({0: 0.7}))
    plain = rl(temperature=0.7)
    assert [line.pop("setting/temperature") for line in constant.lines] == [0.7] * 6
    assert same(constant, plain)


def test_a_schedule_acts_from_its_step_on(rl: Callable[..., Any]) -> None:
    plain = rl()
    late = rl(max_new_tokens=schedules.steps({0: 6, 3: 2}))
    for step in range(3):
        assert late.lines[step]["response_length"] == plain.lines[step]["response_length"]
    assert all(line["response_length"] <= 2 for line in late.lines[3:])
    assert [line["setting/max_new_tokens"] for line in late.lines] == [6, 6, 6, 2, 2, 2]


def test_feedback_from_a_metric_reaches_the_setting(rl: Callable[..., Any]) -> None:
    """A target that no entropy reaches: the upper clip rises by .1 after every step."""
    rising = schedules.track("entropy", target=99.0, first=0.2, change=0.1, low=0.2, high=0.5)
    ran = rl(num_minibatches=2, surrogate=Clip(clip_high=rising))
    found = [line["setting/surrogate/clip_high"] for line in ran.lines]
    assert found == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.5, 0.5])


def test_resetting_the_reference_every_step_leaves_no_penalty(rl: Callable[..., Any]) -> None:
    held = rl(kl=KL(0.5))
    reset = rl(kl=KL(0.5, reference_every=1))
    twice = rl(kl=KL(0.5, reference_every=3))
    assert max(abs(line["kl_reference"]) for line in reset.lines) < 1e-4
    assert held.lines[3]["kl_reference"] > 1e-3
    assert abs(twice.lines[3]["kl_reference"]) < 1e-4
    assert twice.lines[5]["kl_reference"] > 1e-3


def test_a_domain_without_penalty(rl: Callable[..., Any], same: Any) -> None:
    both = {"short": 0.0, "words": 0.0}
    assert same(rl(kl=KL(0.5, domains=both)), rl(drop_zero_variance=False))
    assert not same(rl(kl=KL(0.5)), rl(kl=KL(0.5, domains={"short": 0.0})))
    in_reward = KL(0.5, where="reward")
    without = KL(0.5, where="reward", domains={"short": 0.0})
    assert not same(rl(kl=in_reward), rl(kl=without))


def test_unfinished_responses_are_left_out(rl: Callable[..., Any]) -> None:
    masked = rl(mask_unfinished=True, drop_zero_variance=False)
    for line in masked.lines:
        assert line["train_fraction"] == pytest.approx(line["finished_share"], abs=1e-5)


def test_every_rollout_is_kept_with_its_step(rl: Callable[..., Any]) -> None:
    ran = rl()
    rows = rows_of(ran)
    assert len(rows) == 6 * 6 * 4
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    for step, line in enumerate(ran.lines):
        rewards = [row["reward"] for row in rows if row["step"] == step]
        assert sum(rewards) / len(rewards) == pytest.approx(line["reward"], abs=1e-5)
    assert sum(row["num_tokens"] for row in rows) == ran.lines[-1]["tokens"]


def test_a_resumed_log_forgets_what_will_be_sampled_again(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "row": row}) + "\n" for step in range(3) for row in "ab"]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(lines) + '{"step": 3, "ro')
    found = list(RolloutLog(tmp_path).resume(2))
    assert found == [[{"step": step, "row": row} for row in "ab"] for step in range(2)]
    assert path.read_text() == "".join(lines[:4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": schedules.linear(1, 2)}, "steps cannot have a schedule; settings that can: "),
        ({"temperature": schedules.linear(1.0, 0.0)}, "temperature = 0.0 of its schedule"),
        ({"temperature": {"schedule": "linar"}}, "choices: steps, linear"),
        ({"kl": {"coef": 0.1, "domains": {"short": -1.0}}}, r"'kl\.domains\.short': -1\.0 is not"),
        ({"kl": {"coef": 0.1, "reference_every": 0}}, r"'kl\.reference_every': 0 is not allowed"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("rl", "mine", BASE | changes)


def test_a_penalty_that_begins_later_loads_a_reference(rl: Callable[..., Any]) -> None:
    late = rl(kl=KL(schedules.steps({0: 0.0, 3: 0.5}), estimator="k2"))
    assert [line["setting/kl/coef"] for line in late.lines] == [0, 0, 0, 0.5, 0.5, 0.5]
    assert late.lines[4]["kl_reference"] > 0
