"""What each token of a batch is credited with: by its group, or by a critic.

Legend: B rows, C chains, N flat response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from posttrain.rl.advantage import advantages, whitened
from posttrain.rl.gae import gae, token_rewards
from posttrain.rl.types import Rollouts
from posttrain.stages.chains import last_of, sum_of
from posttrain.stages.rollouts import Scored
from posttrain.stages.settings.rl import Rl


class Values(Protocol):
    """A critic, as far as advantages need it."""

    def values_N(self, rollouts: Rollouts) -> Tensor:
        """The value of the state before each response token, on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Advantages, and with a critic what it is to learn."""

    advantage_N: Tensor
    return_N: Tensor | None = None
    value_N: Tensor | None = None
    """Values before the updates on the batch."""


def credit(
    config: Rl,
    critic: Values | None,
    scored: Scored,
    kept_B: Tensor,
    *,
    kl_N: Tensor | None,
    kl_weight_B: Tensor,
) -> Credit:
    """The advantage of every response token, on the CPU.

    `kl_N` is the KL divergence that is taken off the rewards, None for nothing; `kl_weight_B` the
    factor on its coefficient. A critic sees it at the token where it arises (InstructGPT, arXiv
    2203.02155, Eq. 2), and its advantages are whitened over the tokens of the rows in `kept_B`,
    those that are learned from. Without a critic the sum over a response lowers its reward. The
    rows of a chain share their advantage, which is one chain's among the others, and all their KL.
    """
    row_N, reward_B = scored.rollouts.row_N(), scored.reward_B
    scale_B = config.kl_coef * kl_weight_B
    if critic is None:
        segments, group_C = config.segments, last_of(scored.group_B, config.segments)
        reward_C = last_of(reward_B, segments)
        if kl_N is not None:
            kl_B = torch.zeros_like(reward_B).index_add(0, row_N, kl_N)
            reward_C = reward_C - sum_of(scale_B * kl_B, segments)
        assert config.advantage != "gae", "it has a critic"
        advantage_C = advantages(reward_C, group_C, mode=config.advantage)
        return Credit(advantage_N=advantage_C.repeat_interleave(segments)[row_N])
    penalty_N = None if kl_N is None else scale_B[row_N] * kl_N
    value_N = critic.values_N(scored.rollouts)
    advantage_N, return_N = gae(
        token_rewards(reward_B, row_N, penalty_N),
        value_N,
        row_N,
        num_rows=len(reward_B),
        gamma=config.gae_gamma,
        lam=config.gae_lambda,
    )
    kept_N = kept_B[row_N]
    advantage_N = advantage_N.masked_scatter(kept_N, whitened(advantage_N[kept_N]))
    return Credit(advantage_N=advantage_N, return_N=return_N, value_N=value_N)
