"""Returns and generalised advantages of tokens: hand-derived values, limits, invariances."""

import pytest
import torch
from torch import Tensor

from posttrain.rl.gae import gae, token_rewards

ROW_N = torch.tensor([0, 0, 0, 1, 3, 3])
"""Row 2 has no token."""
REWARD_N = torch.tensor([0.0, -1.0, 4.0, 2.0, 1.0, 3.0], dtype=torch.float64)
VALUE_N = torch.tensor([1.0, 2.0, 3.0, 1.5, 0.0, -1.0], dtype=torch.float64)


def test_token_rewards_by_hand():
    """Each row's reward at its last token; a penalty at every token. Row 2's 9 goes nowhere."""
    reward_B = torch.tensor([4.0, 2.0, 9.0, 3.0])
    assert token_rewards(reward_B, ROW_N).tolist() == [0, 0, 4, 2, 0, 3]
    penalty_N = torch.tensor([0.5, -0.25, 1.0, 0.0, 2.0, 1.0])
    assert token_rewards(reward_B, ROW_N, penalty_N).tolist() == [-0.5, 0.25, 3.0, 2.0, -2.0, 2.0]


def returns(reward_N: Tensor, row_N: Tensor, *, num_rows: int, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma G_(t+1): the estimate at lambda 1, whatever the values; here of 0."""
    return gae(reward_N, torch.zeros_like(reward_N), row_N, num_rows=num_rows, gamma=gamma, lam=1)[
        1
    ]


def test_returns_by_hand():
    """gamma 1/2. Row 0: 4, -1 + 2 = 1, 0 + 1/2. Row 3: 3, 1 + 3/2. gamma 1 adds up."""
    half_N = returns(REWARD_N, ROW_N, num_rows=4, gamma=0.5)
    assert half_N.tolist() == [0.5, 1.0, 4.0, 2.0, 2.5, 3.0]
    assert returns(REWARD_N, ROW_N, num_rows=4).tolist() == [3.0, 3.0, 4.0, 2.0, 4.0, 3.0]


def test_gae_by_hand():
    """gamma 1/2, lambda 1/2, so advantages carry over with 1/4.

    Row 0: delta = 0 + 2/2 - 1 = 0; -1 + 3/2 - 2 = -1.5; 4 - 3 = 1.
           A = 1; -1.5 + 1/4 = -1.25; 0 - 1.25/4 = -0.3125.
    Row 1: 2 - 1.5 = 0.5. Row 3: delta = 1 - 1/2 - 0 = 0.5; 3 + 1 = 4. A = 4; 0.5 + 1 = 1.5.
    Returns are A + V.
    """
    advantage_N, return_N = gae(REWARD_N, VALUE_N, ROW_N, num_rows=4, gamma=0.5, lam=0.5)
    assert advantage_N.tolist() == [-0.3125, -1.25, 1.0, 0.5, 1.5, 4.0]
    assert return_N.tolist() == [0.6875, 0.75, 4.0, 2.0, 1.5, 3.0]


def test_the_ends_of_lambda():
    """lambda 1: the return less the value. lambda 0: the one-step error, gamma 0: r - V."""
    options = {"num_rows": 4, "gamma": 0.9}
    advantage_N, return_N = gae(REWARD_N, VALUE_N, ROW_N, **options, lam=1.0)
    torch.testing.assert_close(return_N, returns(REWARD_N, ROW_N, **options))
    torch.testing.assert_close(advantage_N, return_N - VALUE_N)
    one_step_N, _ = gae(REWARD_N, VALUE_N, ROW_N, **options, lam=0.0)
    next_N = torch.tensor([2.0, 3.0, 0.0, 0.0, -1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(one_step_N, REWARD_N + 0.9 * next_N - VALUE_N)
    here_N, _ = gae(REWARD_N, VALUE_N, ROW_N, num_rows=4, gamma=0.0, lam=0.7)
    torch.testing.assert_close(here_N, REWARD_N - VALUE_N)


def test_a_critic_that_is_right_leaves_no_advantage():
    """With V = the returns every error is 0, whatever lambda."""
    value_N = returns(REWARD_N, ROW_N, num_rows=4, gamma=0.8)
    advantage_N, return_N = gae(REWARD_N, value_N, ROW_N, num_rows=4, gamma=0.8, lam=0.6)
    torch.testing.assert_close(advantage_N, torch.zeros_like(value_N))
    torch.testing.assert_close(return_N, value_N)


def test_row_order_and_parts():
    """Rows in another order, interleaved, or in calls of their own: each keeps its numbers, bit
    for bit."""
    advantage_N, return_N = gae(REWARD_N, VALUE_N, ROW_N, num_rows=4, gamma=0.9, lam=0.7)
    order_N = torch.tensor([4, 0, 3, 1, 5, 2])
    mixed_N, mixed_return_N = gae(
        REWARD_N[order_N], VALUE_N[order_N], ROW_N[order_N], num_rows=4, gamma=0.9, lam=0.7
    )
    assert mixed_N.tolist() == advantage_N[order_N].tolist()
    assert mixed_return_N.tolist() == return_N[order_N].tolist()
    terminal_B = torch.tensor([4.0, 2.0, 9.0, 3.0])
    whole_N = token_rewards(terminal_B, ROW_N)
    assert token_rewards(terminal_B, ROW_N[order_N]).tolist() == whole_N[order_N].tolist()
    for row in (0, 1, 3):
        here_N = row == ROW_N
        zeros_N = torch.zeros(int(here_N.sum()), dtype=torch.int64)
        alone_N, _ = gae(REWARD_N[here_N], VALUE_N[here_N], zeros_N, num_rows=1, gamma=0.9, lam=0.7)
        assert alone_N.tolist() == advantage_N[here_N].tolist()


def test_detached_and_empty():
    value_N = VALUE_N.clone().requires_grad_()
    assert not any(t.requires_grad for t in gae(REWARD_N, value_N, ROW_N, num_rows=4))
    empty_N, none_N = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for num_rows in (0, 2):
        assert gae(empty_N, empty_N, none_N, num_rows=num_rows)[0].numel() == 0


def test_errors():
    with pytest.raises(ValueError, match=r"gamma: 1.1 must be in \[0, 1\]"):
        returns(REWARD_N, ROW_N, num_rows=4, gamma=1.1)
    with pytest.raises(ValueError, match=r"lam: -0.5 must be in \[0, 1\]"):
        gae(REWARD_N, VALUE_N, ROW_N, num_rows=4, lam=-0.5)
    with pytest.raises(ValueError, match=r"value_N \(2,\)"):
        gae(REWARD_N, VALUE_N[:2], ROW_N, num_rows=4)
    with pytest.raises(ValueError, match=r"row_N \(6,\), penalty_N \(1,\)"):
        token_rewards(torch.ones(4), ROW_N, torch.ones(1))
