"""Advantages: hand-derived values, row order, degenerate groups."""

import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch

from posttrain.rl.advantage import advantages, whitened, zero_variance
from posttrain.rl.batch import Batch
from posttrain.stages.rl import add_advantages
from posttrain.stages.settings.rl import Rl

MODES = ["group_mean", "group_zscore", "leave_one_out", "batch"]
REWARDS_B = torch.tensor([1.0, 4.0, 0.0, 6.0, 2.0], dtype=torch.float64)
GROUP_B = torch.tensor([7, -3, 7, -3, 7])


def test_by_hand():
    """Group 7: rewards 1, 0, 2 (mean 1, std 1). Group -3: 4, 6 (mean 5, std sqrt 2).

    Leave one out, group 7: 1 - (0 + 2) / 2 = 0, 0 - 3 / 2, 2 - 1 / 2; group -3: 4 - 6 and 6 - 4.
    All rows: mean 2.6, squared deviations 2.56 + 1.96 + 6.76 + 11.56 + 0.36 = 23.2, std
    sqrt(23.2/4).
    """
    expected = {
        "group_mean": [0.0, -1.0, -1.0, 1.0, 1.0],
        "group_zscore": [0.0, -1 / (2**0.5 + 0.1), -1 / 1.1, 1 / (2**0.5 + 0.1), 1 / 1.1],
        "leave_one_out": [0.0, -2.0, -1.5, 2.0, 1.5],
        "batch": [x / (5.8**0.5 + 0.1) for x in (0.0, -1.0, -1.0, 1.0, 1.0)],
        "global": [x / (5.8**0.5 + 0.1) for x in (-1.6, 1.4, -2.6, 3.4, -0.6)],
    }
    for mode, values in expected.items():
        result_B = advantages(REWARDS_B, GROUP_B, mode=mode, epsilon=0.1)
        assert result_B.tolist() == pytest.approx(values, abs=1e-12), mode


@pytest.mark.parametrize("mode", [*MODES, "global"])
def test_row_order(mode: str):
    order_B = torch.tensor([3, 0, 4, 2, 1])
    shuffled_B = advantages(REWARDS_B[order_B], GROUP_B[order_B], mode=mode)
    torch.testing.assert_close(shuffled_B, advantages(REWARDS_B, GROUP_B, mode=mode)[order_B])


@pytest.mark.parametrize("mode", ["group_mean", "group_zscore", "leave_one_out"])
def test_groups_do_not_see_each_other(mode: str):
    alone_B = advantages(REWARDS_B[GROUP_B == 7], GROUP_B[GROUP_B == 7], mode=mode)
    torch.testing.assert_close(alone_B, advantages(REWARDS_B, GROUP_B, mode=mode)[GROUP_B == 7])


@pytest.mark.parametrize("mode", MODES)
def test_a_group_without_contrast_gets_exactly_zero(mode: str):
    """The float32 mean of seven times 0.1 is not 0.1; epsilon would magnify the difference."""
    rewards_B = torch.tensor([*[0.1] * 7, 5.0, 0.0, 1.0])
    group_B = torch.tensor([*[0] * 7, 1, 2, 2])
    zeros_B = torch.zeros(7, dtype=torch.int64)
    sum_1 = torch.zeros(1).index_add(0, zeros_B, rewards_B[:7])
    assert (sum_1 / 7 - 0.1).abs().item() > 1e-9
    result_B = advantages(rewards_B, group_B, mode=mode)
    assert result_B[:8].tolist() == [0.0] * 8
    assert result_B[8] < 0 < result_B[9]
    assert zero_variance(rewards_B, group_B).tolist() == [True] * 8 + [False] * 2


def test_global_has_no_groups():
    """The groups change nothing; a batch of equal float32 rewards gets exactly 0."""
    grouped_B = advantages(REWARDS_B, GROUP_B, mode="global")
    ungrouped_B = advantages(REWARDS_B, torch.arange(5), mode="global")
    assert grouped_B.tolist() == ungrouped_B.tolist()
    torch.testing.assert_close(grouped_B, whitened(REWARDS_B))
    equal_B = advantages(torch.full((7,), 0.1), torch.arange(7), mode="global")
    assert equal_B.tolist() == [0.0] * 7


def test_whitened_by_hand():
    """1, 4, 0, 6, 2: mean 2.6, std sqrt 5.8 as above. Equal values, one, none: zeros."""
    expected = [x / (5.8**0.5 + 0.1) for x in (-1.6, 1.4, -2.6, 3.4, -0.6)]
    assert whitened(REWARDS_B, epsilon=0.1).tolist() == pytest.approx(expected)
    for values in ([0.1] * 7, [3.0], []):
        assert whitened(torch.tensor(values)).tolist() == [0.0] * len(values)


def test_leave_one_out_zscore():
    """By hand: leave one out gives 0, -2, -1.5, 2, 1.5 as above, whose mean is 0 and whose squares
    add up to 12.5, so that their deviation is sqrt(12.5 / 4)."""
    settings = Rl(steps=1, advantage="leave_one_out_zscore")
    batch = Batch.from_tokens([[7]] * 5, [[8, 8]] * 5, pad_id=0)
    batch["reward_B"], batch["group_B"] = REWARDS_B.float(), GROUP_B
    add_advantages(settings, batch, None)
    expected = [x / (3.125**0.5 + 1e-4) for x in (0.0, -2.0, -1.5, 2.0, 1.5) for _ in range(2)]
    assert batch["advantage_N"].tolist() == pytest.approx(expected, abs=1e-6)


def test_leave_one_out_zscore_is_trls():
    """The lines of TRL 1.16's `RLOOTrainer` that turn rewards into advantages, run on ours."""
    trainer = pytest.importorskip("trl.trainer.rloo_trainer")
    source = inspect.getsource(trainer.RLOOTrainer)
    first, last = "        grouped_rewards = rewards.view(", "        # Unscorable completions"
    lines = source[source.index(first) : source.index(last)]
    rewards_B = torch.rand(12, generator=torch.Generator().manual_seed(0))
    trls = {
        "self": SimpleNamespace(normalize_advantages=True),
        "rewards": rewards_B,
        "num_generations": 4,
        "torch": torch,
        "nanstd": trainer.nanstd,
    }
    exec(textwrap.dedent(lines), trls)
    batch = Batch.from_tokens([[7]] * 12, [[8]] * 12, pad_id=0)
    batch["reward_B"], batch["group_B"] = rewards_B, torch.arange(3).repeat_interleave(4)
    add_advantages(Rl(steps=1, advantage="leave_one_out_zscore"), batch, None)
    torch.testing.assert_close(batch["advantage_N"], trls["advantages"])


def test_one_row():
    for mode in [*MODES, "global"]:
        assert advantages(torch.tensor([3.0]), torch.tensor([0]), mode=mode).tolist() == [0.0]


def test_errors():
    with pytest.raises(ValueError, match="'zscore' is not one of group_mean, group_zscore"):
        advantages(REWARDS_B, GROUP_B, mode="zscore")
    with pytest.raises(ValueError, match=r"rewards_B \(5,\), group_B \(4,\)"):
        advantages(REWARDS_B, GROUP_B[:4], mode="group_mean")
    rewards_B = REWARDS_B.clone()
    rewards_B[[1, 3]] = torch.tensor([torch.nan, torch.inf], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rows \[1, 3\] are not finite"):
        advantages(rewards_B, GROUP_B, mode="group_mean")
