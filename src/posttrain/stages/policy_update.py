"""The loss of a policy-gradient step: which rows, which constants, and how they become one number.

Legend: B rows, N flat response tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.backends.base import Head, Metrics, MicroBatch
from posttrain.backends.local import LocalLearner, rollout_logprobs
from posttrain.losses.ops import aggregation_weights, kl_estimate
from posttrain.losses.policy import kl_penalty, policy_gradient, unbiased_kl_penalty
from posttrain.losses.surrogates import cispo, geometric_mean, squared_log_ratio
from posttrain.rl.corrections import importance_correction, off_policy_mask
from posttrain.rl.kept import flat_index
from posttrain.rl.types import Rollouts
from posttrain.stages.rollouts import Scored
from posttrain.stages.settings.rl import Rl


class PolicyUpdate:
    """The rows of one optimiser step with the constants of their loss, which are on `device`."""

    def __init__(
        self,
        config: Rl,
        *,
        advantage_N: Tensor,
        rows: Rollouts,
        old_logp_N: Tensor | None,
        reference_logp_N: Tensor | None,
        kl_weight_B: Tensor,
        device: torch.device,
    ) -> None:
        self.config, self.rows = config, rows
        self.kl_weight_B = kl_weight_B.to(device)
        self.advantage_N = advantage_N.to(device)
        self.old_logp_N = None if old_logp_N is None else old_logp_N.to(device)
        self.reference_logp_N = None
        if reference_logp_N is not None:
            self.reference_logp_N = reference_logp_N.to(device)
        self.constant = config.aggregation_constant or config.max_new_tokens
        self.sampler_logp_N = rows.sampler_logp_N().to(device)
        length_B = rows.response_len_B
        self.length_B = length_B.to(device)
        self.start_B = (length_B.cumsum(0) - length_B).to(device)
        self.count = float(length_B.sum() if config.aggregation == "token" else len(length_B))

    def loss(self, hidden_ND: Tensor, head: Head, part: MicroBatch) -> tuple[Tensor, Metrics]:
        """The surrogate, plus the KL penalty where it belongs to the loss."""
        config, length_B = self.config, part.rollouts.response_len_B
        row_N = part.rollouts.row_N()
        flat_N = flat_index(self.start_B, self.length_B, part.index_B)
        logp_N, entropy_N = rollout_logprobs(hidden_ND, head, part.rollouts, config.temperature)
        weight_N, _ = aggregation_weights(
            row_N, len(length_B), aggregation=config.aggregation, constant=self.constant
        )
        old_logp_N = logp_N.detach() if self.old_logp_N is None else self.old_logp_N[flat_N]
        correction_N, metrics = importance_correction(
            old_logp_N,
            self.sampler_logp_N[flat_N],
            mode=config.correction,
            low=config.correction_low,
            high=config.correction_high,
            row_N=row_N,
            num_rows=len(length_B),
        )
        total, policy_metrics = self._surrogate(
            logp_N, old_logp_N, self.advantage_N[flat_N], weight_N, row_N, correction_N
        )
        metrics = metrics | policy_metrics | {"entropy": entropy_N.sum()}
        if self.reference_logp_N is not None and config.kl_in == "loss":
            penalty, penalty_metrics = self._penalty(
                logp_N,
                old_logp_N,
                self.reference_logp_N[flat_N],
                weight_N * self.kl_weight_B[part.index_B][row_N],
            )
            total = total + config.kl_coef * penalty
            metrics["kl_reference"] = penalty_metrics["kl"]
        metrics["tokens"] = logp_N.new_tensor(float(len(logp_N)))
        return total, metrics

    def _surrogate(
        self,
        logp_N: Tensor,
        old_logp_N: Tensor,
        advantage_N: Tensor,
        weight_N: Tensor,
        row_N: Tensor,
        correction_N: Tensor,
    ) -> tuple[Tensor, Metrics]:
        """The policy gradient that the settings name."""
        config, num_rows, masked = self.config, int(row_N[-1]) + 1, {}
        if config.off_policy_delta is not None:
            mask_N, masked = off_policy_mask(
                logp_N,
                old_logp_N,
                advantage_N,
                row_N,
                num_rows=num_rows,
                delta=config.off_policy_delta,
            )
            correction_N = correction_N * mask_N
        tensors = (logp_N, old_logp_N, advantage_N, weight_N, row_N)
        common: dict[str, Any] = {"num_rows": num_rows, "correction_N": correction_N}
        if config.surrogate == "squared":
            total, metrics = squared_log_ratio(*tensors, tau=config.tau, **common)
            return total, metrics | masked
        common |= {"clip_low": config.clip_low, "clip_high": config.clip_high}
        if config.surrogate == "geometric_mean":
            total, metrics = geometric_mean(*tensors, **common)
        elif config.surrogate == "cispo":
            total, metrics = cispo(*tensors, ratio=config.ratio, **common)
        else:
            total, metrics = policy_gradient(
                *tensors, ratio=config.ratio, dual_clip=config.dual_clip, **common
            )
        return total, metrics | masked

    def _penalty(
        self, logp_N: Tensor, old_logp_N: Tensor, reference_logp_N: Tensor, weight_N: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The KL penalty of the loss."""
        if self.config.kl_estimator == "unbiased":
            return unbiased_kl_penalty(logp_N, old_logp_N, reference_logp_N, weight_N)
        return kl_penalty(logp_N, reference_logp_N, weight_N, estimator=self.config.kl_estimator)


def old_logprobs(
    config: Rl, learner: LocalLearner, scored: Scored, parts: list[Tensor]
) -> Tensor | None:
    """`logp_N` of the whole batch under the policy before the first of its updates on `parts`.

    None with one update, where the old policy is the current one and the ratio is exactly 1. With
    several, the sampler has just reported the log-probs; where a correction compares the two
    engines the learner computes its own, for the rows of all updates but the first.
    """
    if config.updates_per_batch == 1:
        return None
    rollouts = scored.rollouts
    if config.correction == "none":
        return rollouts.sampler_logp_N()
    logp_N = torch.zeros(rollouts.num_tokens)
    if len(parts) > 1:
        later_B = torch.cat(parts[1:]).sort().values
        length_B = rollouts.response_len_B
        flat_N = flat_index(length_B.cumsum(0) - length_B, length_B, later_B)
        later = rollouts.rows(later_B)
        logp_N[flat_N] = learner.logprobs(later, temperature=config.temperature)
    return logp_N


def reward_kl(config: Rl, scored: Scored, reference_logp_N: Tensor) -> Tensor:
    """`kl_N`: the estimate of KL(policy || reference) at each token, to be taken off the reward."""
    assert config.kl_estimator != "unbiased", "refused with kl_in = reward"
    return kl_estimate(
        scored.rollouts.sampler_logp_N(), reference_logp_N, estimator=config.kl_estimator
    )


def kl_weights(config: Rl, scored: Scored) -> Tensor:
    """`kl_weight_B`: the factor on `kl_coef` of each row's domain, 1 where none is given."""
    weights = [config.domain_kl.get(p["domain"], 1.0) for p in scored.problems]
    return torch.tensor(weights, dtype=torch.float32)
