"""Losses of reward models: Bradley-Terry on pairs (margin, centring, K-wise), and pointwise.

As elsewhere, losses and metrics are sums, here over pairs (responses in `pointwise`), and the
caller divides by the count of the whole step.

Shape suffixes: P pairs, B responses, U distinct prompts.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from posttrain.losses.ops import Metrics, active_sum, same_shape, weighted_sum


def bradley_terry(
    chosen_P: Tensor,
    rejected_P: Tensor,
    weight_P: Tensor,
    *,
    margin_P: Tensor | None = None,
    centring: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Sum of `weight * (-log sigmoid(c - r - margin) + centring * (c + r)^2)`.

    `chosen_P` (c) and `rejected_P` (r) are the rewards of the two responses of each pair, both
    differentiable. `weight_P` and `margin_P` are constants.

    - Weight 1: the plain loss (arXiv 2203.02155, Eq. 1, with K = 2).
    - `prompt_weights`: all pairs of one prompt count together as one (InstructGPT, arXiv
      2203.02155, Eq. 1).
    - `margin_P`: how far apart the rewards have to be, larger for a clearer preference (Llama 2,
      arXiv 2307.09288, Eq. 2).
    - `centring`: pulls the rewards towards a mean of 0, which the difference leaves open (arXiv
      2312.09244, section 2; TRL's `center_rewards_coefficient`, where 0.01 is usual).

    Metrics, sums over the pairs of non-zero weight: `accuracy` (c > r), `margin` (c - r),
    `reward_chosen`, `reward_rejected`. Raises ValueError for a negative `centring` or shapes that
    differ.
    """
    same_shape(chosen_P=chosen_P, rejected_P=rejected_P, weight_P=weight_P, margin_P=margin_P)
    if not centring >= 0:
        raise ValueError(f"centring: {centring} must be at least 0; 0.01 is usual")
    active_P = weight_P != 0
    # Before any arithmetic: what is not finite at weight 0 would be NaN in the gradient.
    chosen_P = torch.where(active_P, chosen_P, 0)
    rejected_P = torch.where(active_P, rejected_P, 0)
    difference_P = chosen_P - rejected_P
    wanted_P = difference_P
    if margin_P is not None:
        wanted_P = difference_P - torch.where(active_P, margin_P.detach(), 0)
    loss_P = -logsigmoid(wanted_P)
    if centring > 0:
        loss_P = loss_P + centring * (chosen_P + rejected_P).square()
    metrics = {
        "accuracy": active_sum((difference_P > 0).to(chosen_P.dtype), weight_P),
        "margin": active_sum(difference_P, weight_P),
        "reward_chosen": active_sum(chosen_P, weight_P),
        "reward_rejected": active_sum(rejected_P, weight_P),
    }
    return weighted_sum(loss_P, weight_P), metrics


def prompt_weights(prompt_P: Tensor) -> tuple[Tensor, float]:
    """`(weight_P float32, count)`: 1 / pairs of the same prompt, and the number of prompts.

    `prompt_P` (int64) says which pairs have the same prompt; the ids may be any integers. All
    C(K, 2) pairs of K ranked responses make 1 / C(K, 2) (InstructGPT, arXiv 2203.02155, Eq. 1);
    where ties leave fewer pairs it is the mean over those that are left. All pairs of a prompt
    belong into the same step: the weights are of the whole step, and computed before it is split.
    """
    # [P] -> [U] -> [P]: the pairs of each prompt, then 1 / that at each of its pairs.
    _, index_P, size_U = torch.unique(prompt_P, return_inverse=True, return_counts=True)
    return size_U.to(torch.float32).reciprocal()[index_P], float(len(size_U))


def pointwise(reward_B: Tensor, label_B: Tensor, weight_B: Tensor) -> tuple[Tensor, Metrics]:
    """Sum of `-weight * (y log sigmoid(r) + (1 - y) log(1 - sigmoid(r)))`: no pairs needed.

    `reward_B` (r, differentiable) is a logit: sigmoid(r) is the probability of a good response.
    `label_B` (y, constant) is in [0, 1], and may be a share of votes. Sources: the outcome
    reward models of Lambert, "RLHF Book"; DeepSeek-R1's safety reward model, arXiv 2501.12948.

    Metrics, sums over the responses of non-zero weight: `accuracy` (r > 0 where y > 1/2, and r <= 0
    elsewhere), `reward`. Raises ValueError for a label outside [0, 1] or shapes that differ.
    """
    same_shape(reward_B=reward_B, label_B=label_B, weight_B=weight_B)
    active_B = weight_B != 0
    label_B = torch.where(active_B, label_B.detach(), 0).to(reward_B.dtype)
    if not bool(((label_B >= 0) & (label_B <= 1)).all()):
        raise ValueError("label_B: every label must be in [0, 1], 1 for a good response")
    reward_B = torch.where(active_B, reward_B, 0)
    loss_B = binary_cross_entropy_with_logits(reward_B, label_B, reduction="none")
    metrics = {
        "accuracy": active_sum(((reward_B > 0) == (label_B > 0.5)).to(reward_B.dtype), weight_B),
        "reward": active_sum(reward_B, weight_B),
    }
    return weighted_sum(loss_B, weight_B), metrics
