"""Rows that are left out of the loss: what that does to the gradient, and what it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.algorithms import KL, ConstantSum, Gae, Kimi, Truncated
from posttrain.backends.local import LocalLearner
from posttrain.engine.errors import ConfigError
from posttrain.engine.jsonl import read_jsonl
from posttrain.rl.batch import Batch, Minibatch
from posttrain.stages import distill as distill_stage
from posttrain.stages import rl as rl_stage
from posttrain.stages.config import build_config
from posttrain.stages.rl import rows_to_train
from posttrain.stages.rollout import minibatches
from posttrain.stages.settings.rl import Rl

AGGREGATIONS = ("token", "sequence", ConstantSum(5))
# Nearly no step, so that what a later update reads is the same with all rows and without some.
ONE_STEP: dict[str, Any] = {"steps": 1, "max_new_tokens": 6, "lr": 1e-12, "warmup_steps": 0}
RL = ONE_STEP | {"prompts_per_step": 8, "group_size": 3}
DISTILL = ONE_STEP | {"prompts_per_step": 24, "routes": {"short": "first", "words": "second"}}


@pytest.fixture
def gradients(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[list[Tensor], Any]]:
    """The gradient of each update of a stage, all weights in one, and the stage that ran."""
    found: list[Tensor] = []
    step = LocalLearner.step

    def kept(self: LocalLearner, lr: float) -> float:
        found.append(torch.cat([p.grad.flatten().clone() for p in self.parameters]))
        return step(self, lr)

    monkeypatch.setattr(LocalLearner, "step", kept)

    def run(kind: str, **changes: Any) -> tuple[list[Tensor], Any]:
        found.clear()
        inputs = {"start": models["start"], **domains}
        if kind == "distill":
            inputs |= {"teachers.first": models["one"], "teachers.second": models["two"]}
        ran = run_stage(kind, (DISTILL if kind == "distill" else RL) | changes, inputs)
        return list(found), ran

    return run


def assert_close(ours: list[Tensor], others: list[Tensor]) -> None:
    assert len(ours) == len(others) > 0
    for one, other in zip(ours, others, strict=True):
        assert other.norm() > 1e-4
        assert (one - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
def test_leaving_out_what_teaches_nothing_changes_no_gradient(
    gradients: Callable[..., Any], aggregation: Any, updates: int
) -> None:
    how = {"aggregation": aggregation, "num_minibatches": updates}
    if updates > 1:
        # So that the log-probabilities before the first update are read of rows by their number.
        how["correction"] = Truncated()
    dropped, ran = gradients("rl", **how)
    kept, whole = gradients("rl", **how, drop_zero_variance=False)
    # Otherwise nothing was left out.
    assert ran.lines[0]["train_fraction"] < whole.lines[0]["train_fraction"] == 1
    assert_close(dropped, kept)


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
def test_per_kept_divides_by_what_is_left(gradients: Callable[..., Any], aggregation: Any) -> None:
    """By hand from the rollouts: the same sum, over the rows or tokens of groups with contrast."""
    usual, ran = gradients("rl", aggregation=aggregation)
    per_kept, _ = gradients("rl", aggregation=aggregation, per_kept=True)
    rows = list(read_jsonl(ran.out / "rollouts.jsonl"))
    groups = [rows[i : i + 3] for i in range(0, len(rows), 3)]
    left = [r for group in groups if len({row["reward"] for row in group}) > 1 for r in group]
    counts = [
        sum(row["num_tokens"] for row in part) if aggregation == "token" else len(part)
        for part in (left, rows)
    ]
    assert 0 < counts[0] < counts[1]
    assert_close([gradient * counts[0] / counts[1] for gradient in per_kept], usual)


@pytest.mark.parametrize("kind", ["rl", "distill"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
def test_unfinished_rows_count_and_teach_nothing(
    gradients: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str, aggregation: Any
) -> None:
    """The same gradient as with weights of 0 for the tokens of the rows that were cut."""
    how = {"aggregation": aggregation, "max_new_tokens": 3}
    how |= {"drop_zero_variance": False} if kind == "rl" else {}
    masked, ran = gradients(kind, **how, mask_unfinished=True)
    finished = ran.lines[0]["finished_share"]
    assert 0 < finished < 1
    assert ran.lines[0]["train_fraction"] == pytest.approx(finished, abs=1e-5)
    per_kept, _ = gradients(kind, **how, mask_unfinished=True, per_kept=True)
    if aggregation != "token":
        assert_close([gradient * finished for gradient in per_kept], masked)
    stage = distill_stage if kind == "distill" else rl_stage
    weights = stage.token_weights

    def zeroed(s: Any, batch: Batch, *more: Any) -> Tensor:
        weight_N: Tensor = weights(s, batch, *more)
        return weight_N * batch["finished_B"][batch.row_N]

    monkeypatch.setattr(stage, "token_weights", zeroed)
    by_weight, whole = gradients(kind, **how)
    assert whole.lines[0]["finished_share"] == finished
    assert_close(masked, by_weight)


def test_distillation_goes_on_where_every_response_is_cut(gradients: Callable[..., Any]) -> None:
    """Responses of one token that end are rare, so some step has none; it logs no loss."""
    found, ran = gradients(
        "distill", mask_unfinished=True, max_new_tokens=1, prompts_per_step=2, steps=6
    )
    learned = [line for line in ran.lines if "loss" in line]
    assert len(found) == len(learned) < len(ran.lines) == 6
    assert all(("loss" in line) == (line["finished_share"] > 0) for line in ran.lines)


def rewarded(rewards: list[float], finished: list[bool] | None = None) -> Batch:
    """Responses of 1, 2, 3 ... tokens in groups of two."""
    count = len(rewards)
    batch = Batch.from_tokens([[1]] * count, [[2] * (n + 1) for n in range(count)], pad_id=0)
    batch["reward_B"], batch["group_B"] = torch.tensor(rewards), torch.arange(count) // 2
    batch["finished_B"] = torch.tensor(finished or [True] * count)
    return batch


def test_which_rows_stay() -> None:
    batch = rewarded([1, 1, 0, 1], [True, True, False, True])

    def stay(**changes: Any) -> list[bool]:
        return rows_to_train(Rl(steps=1, **changes), batch).tolist()

    assert stay() == [False, False, True, True]
    assert stay(mask_unfinished=True) == [False, False, False, True]
    assert stay(drop_zero_variance=False) == [True] * 4
    # A penalty has a gradient where rewards have none: in the loss, and in the reward, where it
    # tells the rows of a group apart.
    assert stay(kl=KL(0.1)) == stay(kl=KL(0.1, where="reward")) == [True] * 4
    assert stay(kl=KL(0.0)) == [False, False, True, True]
    # Kimi's loss pulls back what the updates before have moved.
    assert stay(surrogate=Kimi()) == [False, False, True, True]
    assert stay(surrogate=Kimi(), num_minibatches=2) == [True] * 4


def test_minibatches_by_hand() -> None:
    """Rows of 1, 2, 3 and 4 tokens; the first two have no contrast."""

    def of(s: Rl, rewards: list[float]) -> list[Minibatch]:
        batch = rewarded(rewards)
        batch["train_B"] = rows_to_train(s, batch)
        return minibatches(s, batch, 0)

    rewards = [1, 1, 0, 1]
    for aggregation, count in (("token", 10), ("sequence", 4), ("constant", 4)):
        (part,) = of(Rl(steps=1, aggregation=aggregation), rewards)
        assert (part.count, part.num_tokens, len(part.rows)) == (count, 10, 2)
        (part,) = of(Rl(steps=1, aggregation=aggregation, per_kept=True), rewards)
        assert (part.count, len(part.rows)) == (7 if aggregation == "token" else 2, 2)
    # Four shares of one row: two of them have nothing to learn from.
    parts = of(Rl(steps=1, num_minibatches=4), rewards)
    assert len(parts) == 2
    assert sorted(part.count for part in parts) == [3, 4]
    assert len({part.number for part in parts}) == 2
    assert of(Rl(steps=1), [1, 1, 0, 0]) == []
    assert of(Rl(steps=1, per_kept=True), [1, 1, 0, 0]) == []


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("rl", {"per_kept": True, "drop_zero_variance": False}, "no row is left out"),
        ("distill", {"per_kept": True}, "no row is left out"),
        ("rl", {"advantage": {"kind": "gae", "warmup_steps": 3}, "steps": 3}, "fewer warmup_steps"),
    ],
)
def test_what_is_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(kind, "mine", {"steps": 1} | settings)


def test_a_policy_that_learns_in_one_step_is_accepted() -> None:
    settings = build_config("rl", "mine", {"steps": 3, "advantage": Gae(warmup_steps=2)})
    assert settings.advantage.warmup_steps == 2
