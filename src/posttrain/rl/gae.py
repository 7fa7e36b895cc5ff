"""Rewards of single tokens, and generalised advantage estimation from them.

An episode is one response: it ends with its last token, after which there is no value and no
reward. Every function sees the tokens of a row in the order in which they come; rows may come in
any order, and each row is an episode of its own.

Shape suffixes: N flat response tokens of all rows, B rows, R response positions.
"""

import torch
from torch import Tensor

from posttrain.losses.ops import same_shape


def token_rewards(reward_B: Tensor, row_N: Tensor, penalty_N: Tensor | None = None) -> Tensor:
    """`reward_N`: the reward of each row at its last token, minus `penalty_N` at every token.

    `penalty_N` is usually beta times an estimate of the KL to a reference
    (`posttrain.losses.ops.kl_estimate`; InstructGPT, arXiv 2203.02155, Eq. 2). A row without a
    token loses its reward: there is no token to give it to. Raises ValueError for shapes that
    differ.
    """
    same_shape(row_N=row_N, penalty_N=penalty_N)
    position_N, length_B = _positions(row_N, len(reward_B))
    last_N = position_N == length_B[row_N] - 1
    reward_N = torch.where(last_N, reward_B[row_N], 0)
    return reward_N if penalty_N is None else reward_N - penalty_N


def gae(
    reward_N: Tensor,
    value_N: Tensor,
    row_N: Tensor,
    *,
    num_rows: int,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: `(advantage_N, return_N)`, both detached.

    `value_N` is the critic's value of the state BEFORE each token, that is of the prompt and the
    tokens before it. With V = 0 after the last token:

        delta_t = r_t + gamma V_(t+1) - V_t        A_t = delta_t + gamma lam A_(t+1)

    and `return_N` = A + V, what the critic is regressed onto (arXiv 1506.02438, section 3).
    `lam` = 0 is the one-step error, `lam` = 1 the return less the value. Raises ValueError for
    shapes that differ or a factor outside [0, 1].
    """
    same_shape(reward_N=reward_N, value_N=value_N, row_N=row_N)
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}: {factor} must be in [0, 1]")
    value_N = value_N.detach()
    position_N, length_B = _positions(row_N, num_rows)
    width = int(length_B.max()) if num_rows else 0
    # One column more than the longest row: the value after a last token is 0.
    value_BR = value_N.new_zeros(num_rows, width + 1)
    # [N] -> [B, R]: the tokens of a row from column 0 on, whatever order rows come in.
    value_BR[row_N, position_N] = value_N
    # [B, R] -> [N]: for each token the value after it.
    next_N = value_BR[row_N, position_N + 1]
    delta_N = reward_N.detach() + gamma * next_N - value_N
    advantage_BR = value_N.new_zeros(num_rows, width)
    advantage_BR[row_N, position_N] = delta_N
    # From the last token of each row back to its first.
    # What stands behind the last token of a shorter row is 0 and adds nothing.
    for position in range(width - 2, -1, -1):
        advantage_BR[:, position] += gamma * lam * advantage_BR[:, position + 1]
    advantage_N = advantage_BR[row_N, position_N]
    return advantage_N, advantage_N + value_N


def _positions(row_N: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """`(position_N, length_B)`: the place of each token in its row, and the tokens of each row."""
    length_B = torch.bincount(row_N, minlength=num_rows)
    start_B = length_B.cumsum(0) - length_B
    # Stable: the tokens of a row keep their order.
    order_N = torch.argsort(row_N, stable=True)
    sorted_position_N = torch.arange(len(row_N), device=row_N.device) - start_B[row_N[order_N]]
    # The inverse of the sort: each position goes to where its token stood.
    return torch.empty_like(row_N).index_copy(0, order_N, sorted_position_N), length_B
