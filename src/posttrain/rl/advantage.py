"""Advantages of responses from the rewards of their group or of their batch.

A group is the set of responses to one prompt. Pure functions of rewards and group ids, so rows may
come in any order and groups may have any size.

Advantages of single tokens are in `posttrain.rl.gae`.

Shape suffixes: B rows (responses), U distinct groups, N flat response tokens of all rows.
"""

from typing import Literal

import torch
from torch import Tensor

from posttrain.losses.ops import known_choice, row_sums, same_shape

AdvantageMode = Literal["group_mean", "group_zscore", "leave_one_out", "batch", "global"]


def advantages(
    rewards_B: Tensor, group_B: Tensor, *, mode: AdvantageMode, epsilon: float = 1e-4
) -> Tensor:
    """One advantage per response, of the shape of `rewards_B`.

    `group_B` (int64) says which rows answer the same prompt; the ids may be any integers.

    - `group_mean`: r - mean of the group (Dr.GRPO, arXiv 2503.20783; TRL's `scale_rewards="none"`).
    - `group_zscore`: (r - mean) / (std + epsilon), std of the group with Bessel's correction, that
      is over size - 1 (GRPO, arXiv 2402.03300; TRL 1.16's `scale_rewards="group"`, epsilon 1e-4).
    - `leave_one_out`: r - mean of the OTHER rows of the group (RLOO, arXiv 2402.14740).
    - `batch`: (r - mean of the group) / (std of all rows, Bessel's correction, + epsilon) (TRL's
      `scale_rewards="batch"`; LitePPO, arXiv 2508.08221).
    - `global`: (r - mean of all rows) / (std of all rows, Bessel's correction, + epsilon)
      (REINFORCE++, arXiv 2501.03262). The groups are not read: one response per prompt will do.

    A row without contrast gets exactly 0: its group (with `global` the whole batch) has one reward
    only, all equal or a single row.
    Raises ValueError for another mode, shapes that differ or a reward that is not finite.
    """
    known_choice("mode", mode, AdvantageMode)
    same_shape(rewards_B=rewards_B, group_B=group_B)
    if not bool(torch.isfinite(rewards_B).all()):
        rows = torch.nonzero(~torch.isfinite(rewards_B))[:, 0].tolist()
        raise ValueError(
            f"rewards_B: rows {rows[:8]} are not finite; drop them or give them a reward"
        )
    if mode == "global":
        # All rows as one group; what follows is the same.
        group_B = torch.zeros_like(group_B)
    index_B, size_U = _groups(group_B)
    size_B = size_U.to(rewards_B.dtype)[index_B]
    # [B] -> [U] -> [B]: the mean of the group, at each of its rows.
    centred_B = rewards_B - row_sums(rewards_B, index_B, len(size_U))[index_B] / size_B
    # The mean of equal rewards is off by rounding, and epsilon would magnify that.
    centred_B = centred_B.masked_fill(zero_variance(rewards_B, group_B), 0)
    if mode == "group_mean":
        return centred_B
    if mode == "leave_one_out":
        # r - mean of the others = (r - mean of all) * n / (n - 1); alone in a group it is 0.
        return centred_B * size_B / (size_B - 1).clamp(min=1)
    if mode == "group_zscore":
        # [B] -> [U] -> [B]: the sum of squares of the group, at each of its rows.
        square_B = row_sums(centred_B.square(), index_B, len(size_U))[index_B]
        return centred_B / ((square_B / (size_B - 1).clamp(min=1)).sqrt() + epsilon)
    # A batch of one row has no standard deviation; its centred reward is 0.
    std = rewards_B.std() if rewards_B.numel() > 1 else rewards_B.new_zeros(())
    return centred_B / (std + epsilon)


def whitened(advantage_N: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """(A - mean) / (std + epsilon) over all values given, std with Bessel's correction.

    Of tokens: of GAE's advantages (Huang et al., "The 37 implementation details of PPO", 2022,
    detail 7) and of returns with the KL in them (REINFORCE++, arXiv 2501.03262, section 3). Of
    responses: of `leave_one_out` it is TRL's `normalize_advantages`, of `group_mean`
    REINFORCE++-baseline. All values of a step belong into one call. Equal values give exactly 0.
    """
    # As in `advantages`: epsilon would magnify the rounding of a mean of equal values.
    if advantage_N.numel() < 2 or bool((advantage_N == advantage_N[0]).all()):
        return torch.zeros_like(advantage_N)
    return (advantage_N - advantage_N.mean()) / (advantage_N.std() + epsilon)


def zero_variance(rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """True for every row of a group whose rewards are all equal: such a group teaches nothing."""
    same_shape(rewards_B=rewards_B, group_B=group_B)
    index_B, size_U = _groups(group_B)
    # Uninitialised: `include_self=False` leaves its values out.
    extreme_U = rewards_B.new_empty(size_U.shape)
    low_U = extreme_U.scatter_reduce(0, index_B, rewards_B, "amin", include_self=False)
    high_U = extreme_U.scatter_reduce(0, index_B, rewards_B, "amax", include_self=False)
    return (low_U == high_U)[index_B]


def _groups(group_B: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the index of its group among the distinct ids, and the size of each group."""
    _, index_B, size_U = torch.unique(group_B, return_inverse=True, return_counts=True)
    return index_B, size_U
