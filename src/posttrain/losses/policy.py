"""What a policy-gradient step descends: the clipped surrogate, CISPO, GMPO and Kimi's squared loss.

PPO, GRPO, DAPO, Dr.GRPO, RLOO and GSPO are one function here, `policy_gradient`: they differ in the
ratio, in the advantages (`posttrain.rl.advantage`) and in the token weights
(`posttrain.losses.ops.aggregation_weights`). Left out: an entropy bonus.

All surrogates take the same tensors in the same order: `logp_N` is differentiable; `old_logp_N`
(the policy the advantages belong to), `advantage_N`, `weight_N` and `correction_N` are constants;
`row_N` is the row (int64) of each token. `correction_N` multiplies the loss of each token
(`posttrain.rl.corrections`); 0 drops its gradient. Tokens of weight 0 are left out, whatever their
values. All return `(loss sum, metrics)` with sums over the tokens of non-zero weight; `approx_kl`
is the k3 estimate of KL(old || new) of each token.

A ratio is the exp of a log ratio of at most `posttrain.losses.ops.MAX_LOG_RATIO` nats (`bounded`),
whatever it is the ratio of: a token, a mean or a sum over a row. `ratio_bounded` counts the tokens
beyond; they have no gradient.

With old == new all of them have the gradient of the plain policy gradient, `-w A`, at each token;
with GMPO and Kimi's loss that holds where the tokens of a row have one weight and one advantage,
and the gradient of Kimi's is as many times larger as the row has tokens.

Shape suffixes: N flat response tokens of all rows, B rows.
"""

from typing import Literal

import torch
from torch import Tensor

from posttrain.losses.ops import (
    Metrics,
    active_sum,
    bounded,
    bounded_count,
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

    - `ratio="token"`: r = exp(logp - old_logp) (PPO, arXiv 1707.06347; GRPO, arXiv 2402.03300).
    - `ratio="sequence"`: r = the geometric mean of the token ratios of the row, one number for all
      its tokens (GSPO, arXiv 2507.18071). All tokens of a row must be in the same call.
    - `ratio="product"`: r = the product of the token ratios of the row: the response is one action
      (RLOO, arXiv 2402.14740). All tokens of a row must be in the same call.

    `dual_clip` bounds the loss of a negative advantage at `dual_clip * |A|`, where the upper clip
    does not act (Ye et al., arXiv 1912.09729; 3 there); None leaves it unbounded.

    Metrics: `clip_low` and `clip_high` (how many tokens the clip stops at the lower and the upper
    end), `ratio`, `approx_kl`, and `clip_dual` where there is a `dual_clip`. Raises ValueError for
    another `ratio`, a negative clip, a `dual_clip` that is not above 1 or shapes that differ.
    """
    known_choice("ratio", ratio, Ratio)
    _check_clip(clip_low, clip_high)
    _same_shapes(logp_N, old_logp_N, advantage_N, weight_N, row_N, correction_N)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(
            f"dual_clip: {dual_clip} must be above 1, a bound on the ratio; usual is 3"
        )
    active_N = weight_N != 0
    token_log_ratio_N, log_ratio_N = _log_ratios(
        logp_N, old_logp_N, active_N, row_N, num_rows=num_rows, ratio=ratio
    )
    ratio_N = bounded(log_ratio_N).exp()
    advantage_N = _cleared(advantage_N, active_N)
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    # PPO, Eq. 7: the minimum, so that the clip can raise the loss of a token but never lower it.
    loss_N = -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    if dual_clip is not None:
        # max(min(r A, clip(r) A), c A) where A < 0, with the sign of a loss.
        loss_N = torch.where(advantage_N < 0, loss_N.clamp(max=-dual_clip * advantage_N), loss_N)
    # Where the clipped term is the smaller one: a constant, so the token gets no gradient.
    stopped_low_N = (ratio_N < 1 - clip_low) & (advantage_N < 0)
    stopped_high_N = (ratio_N > 1 + clip_high) & (advantage_N > 0)
    metrics = {
        "clip_low": active_sum(stopped_low_N.to(logp_N.dtype), weight_N),
        "clip_high": active_sum(stopped_high_N.to(logp_N.dtype), weight_N),
        "ratio": active_sum(ratio_N, weight_N),
        "ratio_bounded": bounded_count(log_ratio_N, active_N),
        "approx_kl": _approx_kl(token_log_ratio_N, weight_N),
    }
    if dual_clip is not None:
        stopped_N = (ratio_N > dual_clip) & (advantage_N < 0)
        metrics["clip_dual"] = active_sum(stopped_N.to(logp_N.dtype), weight_N)
    return _corrected_sum(loss_N, weight_N, correction_N), metrics


def cispo(
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
    correction_N: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Sum of `-weight * correction * sg[clip(r, 1 - low, 1 + high)] * A * logp`.

    The clip bounds the importance weight and never stops a token's gradient (MiniMax-M1, arXiv
    2506.13585, Eqs. 4 and 5). `clip_low = 1` is no lower bound, which is the paper's choice;
    `clip_high` is large, such as 4, which is an upper bound of 5 on the ratio (ScaleRL, arXiv
    2510.13786). `ratio` as in `policy_gradient`; the paper's is `token`.

    Metrics: `clip_low` and `clip_high` (how many tokens have their weight cut at the lower and the
    upper end, whatever the sign of the advantage), `ratio`, `approx_kl`. Raises ValueError for
    another `ratio`, a negative clip or shapes that differ.
    """
    known_choice("ratio", ratio, Ratio)
    _check_clip(clip_low, clip_high)
    _same_shapes(logp_N, old_logp_N, advantage_N, weight_N, row_N, correction_N)
    active_N = weight_N != 0
    # Detached: the ratio is the weight sg[...], and the gradient goes through `logp_N` alone.
    token_log_ratio_N, log_ratio_N = _log_ratios(
        logp_N.detach(), old_logp_N, active_N, row_N, num_rows=num_rows, ratio=ratio
    )
    ratio_N = bounded(log_ratio_N).exp()
    factor_N = ratio_N.clamp(1 - clip_low, 1 + clip_high) * _cleared(advantage_N, active_N)
    loss_N = -factor_N * torch.where(active_N, logp_N, 0)
    metrics = {
        "clip_low": active_sum((ratio_N < 1 - clip_low).to(logp_N.dtype), weight_N),
        "clip_high": active_sum((ratio_N > 1 + clip_high).to(logp_N.dtype), weight_N),
        "ratio": active_sum(ratio_N, weight_N),
        "ratio_bounded": bounded_count(log_ratio_N, active_N),
        "approx_kl": _approx_kl(token_log_ratio_N, weight_N),
    }
    return _corrected_sum(loss_N, weight_N, correction_N), metrics


def geometric_mean(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    row_N: Tensor,
    *,
    num_rows: int,
    clip_low: float,
    clip_high: float,
    correction_N: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GMPO: sum of `-weight * correction * A * g`, g the geometric mean of clipped token ratios.

    The log ratio of each token is cut at `clip_high` from above where A > 0, and at `-clip_low`
    from below where A <= 0; g = exp(mean over the row) is one number for all tokens of a row
    (arXiv 2507.20673, section 3). The clips are distances of the LOG ratio from 0; the paper
    uses 0.4 for both. All tokens of a row must be in the same call. The paper's mean over rows is
    `aggregation="sequence"`.

    Metrics: `clip_low` and `clip_high` (how many tokens the clip stops at either end), `ratio`
    (g), `approx_kl`. Raises ValueError for a negative clip or shapes that differ.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(
            f"clip_low: {clip_low} and clip_high: {clip_high} must be at least 0; both are "
            "distances of the log ratio from 0, usually 0.4"
        )
    _same_shapes(logp_N, old_logp_N, advantage_N, weight_N, row_N, correction_N)
    active_N = weight_N != 0
    advantage_N = _cleared(advantage_N, active_N)
    log_ratio_N = torch.where(active_N, logp_N - old_logp_N.detach(), 0)
    up_N = advantage_N > 0
    # Clipped before the mean: this stops the gradient of single tokens, not of the whole row.
    # With A = 0 either end will do, since the loss is 0.
    clipped_N = torch.where(
        up_N, log_ratio_N.clamp(max=clip_high), log_ratio_N.clamp(min=-clip_low)
    )
    # [N] -> [B] -> [N]: the mean of each row, at each of its tokens.
    log_mean_N = row_means(clipped_N, row_N, num_rows, active_N)[row_N]
    mean_N = bounded(log_mean_N).exp()
    stopped_low_N = (log_ratio_N < -clip_low) & (advantage_N < 0)
    stopped_high_N = (log_ratio_N > clip_high) & up_N
    metrics = {
        "clip_low": active_sum(stopped_low_N.to(logp_N.dtype), weight_N),
        "clip_high": active_sum(stopped_high_N.to(logp_N.dtype), weight_N),
        "ratio": active_sum(mean_N, weight_N),
        "ratio_bounded": bounded_count(log_mean_N, active_N),
        "approx_kl": _approx_kl(log_ratio_N, weight_N),
    }
    return _corrected_sum(-mean_N * advantage_N, weight_N, correction_N), metrics


def squared_log_ratio(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    row_N: Tensor,
    *,
    num_rows: int,
    tau: float,
    correction_N: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Kimi's loss: sum of `weight * correction * (A - tau * log(pi / pi_old))^2 / (2 tau)`.

    log(pi / pi_old) is the SUM over the tokens of the row, and A the row's r - mean of its group
    (`advantages(mode="group_mean")`): regression onto the optimum of a reward with the penalty
    `tau * KL(pi || pi_old)` (Kimi k1.5, arXiv 2501.12599, section 2.3.2; K2, arXiv 2507.20534,
    section 3.2.3). Both write the bare square. Over 2 tau its gradient is the one that k1.5 gives,
    `-(A - tau * log(pi / pi_old)) * grad log pi`, whose size does not go with tau.

    A row's loss is given to each of its tokens, and all of them must be in the same call. With
    `aggregation="sequence"` a row counts once, as in the papers; every token then has the gradient
    -A while pi = pi_old, without a division by the length.

    Metrics: `ratio` (geometric mean of the row), `approx_kl`, `residual` ((A - tau * log ratio)^2).
    Raises ValueError for a `tau` that is not positive or shapes that differ.
    """
    if not tau > 0:
        raise ValueError(
            f"tau: {tau} must be above 0; it is the weight of the KL to the old policy"
        )
    _same_shapes(logp_N, old_logp_N, advantage_N, weight_N, row_N, correction_N)
    active_N = weight_N != 0
    token_log_ratio_N, log_ratio_N = _log_ratios(
        logp_N, old_logp_N, active_N, row_N, num_rows=num_rows, ratio="product"
    )
    residual_N = (_cleared(advantage_N, active_N) - tau * log_ratio_N).square()
    # For the metric alone: unlike the sum, the mean does not grow with the length of a row.
    log_mean_N = row_means(token_log_ratio_N.detach(), row_N, num_rows, active_N)[row_N]
    metrics = {
        "ratio": active_sum(bounded(log_mean_N).exp(), weight_N),
        "ratio_bounded": bounded_count(log_mean_N, active_N),
        "approx_kl": _approx_kl(token_log_ratio_N, weight_N),
        "residual": active_sum(residual_N, weight_N),
    }
    return _corrected_sum(residual_N / (2 * tau), weight_N, correction_N), metrics


def _log_ratios(
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
    # Selected before any exp: an overflow at weight 0 would be NaN in the backward pass.
    token_log_ratio_N = torch.where(active_N, logp_N - old_logp_N.detach(), 0)
    if ratio == "token":
        return token_log_ratio_N, token_log_ratio_N
    of_rows = row_means if ratio == "sequence" else row_sums
    # [N] -> [B] -> [N]: one number for each row, at each of its tokens.
    return token_log_ratio_N, of_rows(token_log_ratio_N, row_N, num_rows, active_N)[row_N]


def _check_clip(clip_low: float, clip_high: float) -> None:
    """Raise ValueError unless both are distances from ratio 1 and the lower end is at least 0."""
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(
            f"clip_low: {clip_low} must be in [0, 1] and clip_high: {clip_high} at least 0; both "
            "are distances from ratio 1, usually 0.2"
        )


def _same_shapes(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    row_N: Tensor,
    correction_N: Tensor | None,
) -> None:
    same_shape(
        logp_N=logp_N,
        old_logp_N=old_logp_N,
        advantage_N=advantage_N,
        weight_N=weight_N,
        row_N=row_N,
        correction_N=correction_N,
    )


def _cleared(value_N: Tensor, active_N: Tensor) -> Tensor:
    """The constant values of active tokens, and 0: a row's number would carry 0 * NaN on."""
    return torch.where(active_N, value_N.detach(), 0)


def _corrected_sum(loss_N: Tensor, weight_N: Tensor, correction_N: Tensor | None) -> Tensor:
    if correction_N is not None:
        loss_N = loss_N * _cleared(correction_N, weight_N != 0)
    return weighted_sum(loss_N, weight_N)


def _approx_kl(token_log_ratio_N: Tensor, weight_N: Tensor) -> Tensor:
    # k3 with d = log(p_old / p), the negative log ratio: exp(-d) - 1 + d.
    log_ratio_N = bounded(token_log_ratio_N)
    return active_sum(log_ratio_N.expm1() - log_ratio_N, weight_N)
