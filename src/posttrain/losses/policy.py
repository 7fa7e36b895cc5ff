"""The clipped policy gradient (PPO, GRPO, Dr.GRPO, RLOO, GSPO) and KL penalties to a reference.

GRPO, DAPO and Dr.GRPO are one function here: they differ in the advantages
(`posttrain.rl.advantage`) and in the token weights (`posttrain.losses.ops.aggregation_weights`).
Other surrogates are in `posttrain.losses.surrogates`, value losses in `posttrain.losses.value`.
Left out: an entropy bonus.

Shape suffixes: N flat response tokens of all rows, B rows.
"""

from typing import Literal

import torch
from torch import Tensor

from posttrain.losses.ops import (
    Estimator,
    Metrics,
    active_sum,
    kl_estimate,
    known_choice,
    row_means,
    row_sums,
    same_shape,
    weighted_sum,
)

Ratio = Literal["token", "sequence", "product"]


def policy_gradient(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    row_N: Tensor,
    *,
    num_rows: int,
    ratio: Ratio,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    correction_N: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate: sum of `-weight * correction * min(r A, clip(r, 1 - low, 1 + high) A)`.

    `logp_N` is differentiable; `old_logp_N` (the policy the advantages belong to), `advantage_N`,
    `weight_N` and `correction_N` are constants. `row_N` is the row (int64) of each token.

    - `ratio="token"`: r = exp(logp - old_logp) (PPO, arXiv 1707.06347; GRPO, arXiv 2402.03300).
    - `ratio="sequence"`: r = the geometric mean of the token ratios of the row, one number for all
      its tokens (GSPO, arXiv 2507.18071). All tokens of a row must be in the same call.
    - `ratio="product"`: r = the product of the token ratios of the row: the response is one action
      (RLOO, arXiv 2402.14740). All tokens of a row must be in the same call.

    `dual_clip` bounds the loss of a negative advantage at `dual_clip * |A|`, where the upper clip
    does not act (Ye et al., arXiv 1912.09729; 3 there); None leaves it unbounded.

    `correction_N` multiplies each token (`posttrain.rl.corrections`); 0 drops the token's gradient.
    Metrics over the tokens of non-zero weight: `clip_low` and `clip_high` (how many tokens the clip
    stops at the lower and the upper end), `ratio`, `approx_kl` (k3 estimate of KL(old || new)),
    and `clip_dual` where there is a `dual_clip`.
    Raises ValueError for another `ratio`, a negative clip, a `dual_clip` that is not above 1 or
    shapes that differ.
    """
    known_choice("ratio", ratio, Ratio)
    same_shape(
        logp_N=logp_N,
        old_logp_N=old_logp_N,
        advantage_N=advantage_N,
        weight_N=weight_N,
        row_N=row_N,
        correction_N=correction_N,
    )
    check_clip(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(
            f"dual_clip: {dual_clip} must be above 1, a bound on the ratio; usual is 3"
        )
    active_N = weight_N != 0
    token_log_ratio_N, log_ratio_N = log_ratios(
        logp_N, old_logp_N, active_N, row_N, num_rows=num_rows, ratio=ratio
    )
    ratio_N = log_ratio_N.exp()
    # Cleared before they are multiplied: a sequence ratio would carry 0 * NaN to the whole row.
    advantage_N = torch.where(active_N, advantage_N.detach(), 0)
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    if dual_clip is not None:
        loss_N = torch.where(advantage_N < 0, loss_N.clamp(max=-dual_clip * advantage_N), loss_N)
    if correction_N is not None:
        loss_N = loss_N * torch.where(active_N, correction_N.detach(), 0)
    stopped_low_N = (ratio_N < 1 - clip_low) & (advantage_N < 0)
    stopped_high_N = (ratio_N > 1 + clip_high) & (advantage_N > 0)
    metrics = {
        "clip_low": active_sum(stopped_low_N.to(logp_N.dtype), weight_N),
        "clip_high": active_sum(stopped_high_N.to(logp_N.dtype), weight_N),
        "ratio": active_sum(ratio_N, weight_N),
        "approx_kl": active_sum(token_log_ratio_N.expm1() - token_log_ratio_N, weight_N),
    }
    if dual_clip is not None:
        stopped_N = (ratio_N > dual_clip) & (advantage_N < 0)
        metrics["clip_dual"] = active_sum(stopped_N.to(logp_N.dtype), weight_N)
    return weighted_sum(loss_N, weight_N), metrics


def log_ratios(
    logp_N: Tensor,
    old_logp_N: Tensor,
    active_N: Tensor,
    row_N: Tensor,
    *,
    num_rows: int,
    ratio: Ratio,
) -> tuple[Tensor, Tensor]:
    """`(token_log_ratio_N, log_ratio_N)`: log(p / p_old) of each token, and as `ratio` says.

    `sequence` gives every token of a row the mean over the row's active tokens, `product` their
    sum, `token` leaves them. Tokens that are not active (bool) have the log ratio 0 as a token,
    whatever their values, and get no gradient. `old_logp_N` is a constant.
    """
    token_log_ratio_N = torch.where(active_N, logp_N - old_logp_N.detach(), 0)
    if ratio == "token":
        return token_log_ratio_N, token_log_ratio_N
    of_rows = row_means if ratio == "sequence" else row_sums
    return token_log_ratio_N, of_rows(token_log_ratio_N, row_N, num_rows, active_N)[row_N]


def check_clip(clip_low: float, clip_high: float) -> None:
    """Raise ValueError unless both are distances from ratio 1 and the lower end is at least 0."""
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(
            f"clip_low: {clip_low} must be in [0, 1] and clip_high: {clip_high} at least 0; both "
            "are distances from ratio 1, usually 0.2"
        )


def kl_penalty(
    logp_N: Tensor, ref_logp_N: Tensor, weight_N: Tensor, *, estimator: Estimator
) -> tuple[Tensor, Metrics]:
    """Sum of `weight * k(logp, ref_logp)`: a KL penalty towards a reference, as a loss.

    What is descended, in expectation over tokens sampled from the student:

    - `k2`: the gradient of KL(student || reference).
    - `k3`: the gradient of KL(reference || student), the forward KL (GRPO's choice).
    - `k1`: nothing. Its expected gradient is E[grad log p] = 0, so it is refused here.

    As a part of the reward all three are usable (`posttrain.losses.ops.kl_estimate`, detached).
    `ref_logp_N` is a constant. Metrics: `kl`, the unweighted sum of the estimates.
    Raises ValueError for `k1` and for an unknown estimator.
    """
    known_choice("estimator", estimator, Estimator)
    if estimator == "k1":
        raise ValueError(
            "estimator: 'k1' as a loss has zero expected gradient (the mean of grad log p over "
            "samples of p is zero); k1 belongs in the reward. Choices: k2, k3 as a loss; k1, k2, "
            "k3 in the reward"
        )
    same_shape(logp_N=logp_N, ref_logp_N=ref_logp_N, weight_N=weight_N)
    kl_N = kl_estimate(logp_N, ref_logp_N.detach(), estimator=estimator)
    return weighted_sum(kl_N, weight_N), {"kl": active_sum(kl_N, weight_N)}


def unbiased_kl_penalty(
    logp_N: Tensor, old_logp_N: Tensor, ref_logp_N: Tensor, weight_N: Tensor
) -> tuple[Tensor, Metrics]:
    """Sum of `weight * (p / p_old) * k3(logp, ref_logp)`: unbiased in value and gradient.

    In expectation over tokens sampled from the old policy (the one that sampled, or the one before
    the updates on the batch) it is KL(student || reference), and its gradient is the gradient of
    that (DeepSeek-V3.2, arXiv 2512.02556, section 3.1, "unbiased KL estimate"). The ratio carries
    gradient even where it is exactly 1: then d * grad log p is descended, with d = logp - ref_logp.

    `old_logp_N` and `ref_logp_N` are constants. Metrics: `kl`, the unweighted sum of the estimates.
    Raises ValueError for shapes that differ.
    """
    same_shape(logp_N=logp_N, old_logp_N=old_logp_N, ref_logp_N=ref_logp_N, weight_N=weight_N)
    active_N = weight_N != 0
    ratio_N = torch.where(active_N, logp_N - old_logp_N.detach(), 0).exp()
    difference_N = torch.where(active_N, logp_N - ref_logp_N.detach(), 0)
    kl_N = ratio_N * (torch.expm1(-difference_N) + difference_N)
    return weighted_sum(kl_N, weight_N), {"kl": active_sum(kl_N, weight_N)}
