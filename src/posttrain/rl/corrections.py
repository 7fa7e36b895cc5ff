"""Importance corrections for responses that were sampled by a different policy.

The engine that samples and the one that trains compute slightly different log-probabilities
(kernels, precision, weights one step old). The ratio r = pi_train / pi_sampler of a token, cut off,
makes the policy gradient right again.

Shape suffixes: N flat response tokens of all rows, B rows.
"""

from typing import Literal

import torch
from torch import Tensor

from posttrain.losses.ops import (
    Metrics,
    bounded,
    bounded_count,
    known_choice,
    row_means,
    row_sums,
    same_shape,
)

CorrectionMode = Literal["none", "truncated", "icepop", "sequence_truncated", "sequence_icepop"]


def importance_correction(
    train_logp_N: Tensor,
    sampler_logp_N: Tensor,
    *,
    mode: CorrectionMode,
    low: float,
    high: float,
    row_N: Tensor | None = None,
    num_rows: int | None = None,
) -> tuple[Tensor, Metrics]:
    """The detached factor of each token's loss, from r = exp(train_logp - sampler_logp).

    - `none`: 1.
    - `truncated`: min(r, high); `low` is not read (truncated importance sampling; high = 2 is
      usual).
    - `icepop`: r if low <= r <= high, else 0 (MiMo-V2-Flash, arXiv 2601.02780, Eq. 8; [0.5, 5] and
      [0.2, 5] are usual).
    - `sequence_truncated` and `sequence_icepop`: the same with r the product over the row, one
      factor for all its tokens: the ratio of the whole response, which also corrects for the
      tokens before (Liu et al., "When Speed Kills Stability", 2025, Seq-TIS and Seq-MIS; TRL's
      `sequence_truncate` and `sequence_mask`). It leaves any band faster the longer the response.
      All tokens of a row must be in the same call. `row_N` (int64) and `num_rows` are needed here,
      and read nowhere else.

    A token whose log r is not finite (the sampler says -inf or NaN) is masked by all but `none`;
    with a sequence mode its whole row is.

    Metrics, sums over tokens: `correction_masked` (factor 0), `correction_truncated` (cut to
    `high`), `sampler_ratio` (r of the token, finite ones), `sampler_kl` (r - 1 - log r of these:
    over tokens of the sampler its mean estimates the KL of sampler to learner in nats, and shows
    rounding, of which the mean of r says nothing), `sampler_ratio_bounded` (r of token or row
    beyond the bound of `posttrain.losses.ops.bounded`), `correction` and `correction_square` of the
    factor; the effective share of the sample is correction**2 / (correction_square * N). Raises
    ValueError for another mode, shapes that differ, a sequence mode without rows, or unless 0 <=
    low <= 1 <= high.
    """
    known_choice("mode", mode, CorrectionMode)
    same_shape(train_logp_N=train_logp_N, sampler_logp_N=sampler_logp_N)
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"low: {low}, high: {high}; must be 0 <= low <= 1 <= high")
    log_ratio_N = (train_logp_N - sampler_logp_N).detach()
    finite_N = torch.isfinite(log_ratio_N)
    # +inf becomes 0, too: `truncated` would otherwise cut it to `high` and keep the token.
    ratio_N = torch.where(finite_N, bounded(log_ratio_N).exp(), 0)
    token_ratio_N = ratio_N
    token_log_N = torch.where(finite_N, bounded(log_ratio_N), 0)
    if mode.startswith("sequence_"):
        if row_N is None or num_rows is None:
            raise ValueError(f"row_N and num_rows: mode {mode!r} needs the row of each token")
        # An infinite sum stands for a row with a ratio that is not finite.
        # [N] -> [B] -> [N]: the log ratio of each row, at each of its tokens.
        log_ratio_N = row_sums(log_ratio_N, row_N, num_rows)[row_N]
        finite_N = torch.isfinite(log_ratio_N)
        ratio_N = torch.where(finite_N, bounded(log_ratio_N).exp(), 0)
    cut_N = torch.zeros_like(finite_N)
    if mode == "none":
        correction_N = torch.ones_like(ratio_N)
    elif mode.endswith("truncated"):
        cut_N = ratio_N > high
        correction_N = ratio_N.clamp(max=high)
    else:
        keep_N = finite_N & (ratio_N >= low) & (ratio_N <= high)
        correction_N = torch.where(keep_N, ratio_N, 0)
    metrics = {
        "correction_masked": (correction_N == 0).sum().to(ratio_N.dtype),
        "correction_truncated": cut_N.sum().to(ratio_N.dtype),
        "sampler_ratio": token_ratio_N.sum(),
        "sampler_kl": (torch.expm1(token_log_N) - token_log_N).sum(),
        "sampler_ratio_bounded": bounded_count(log_ratio_N, finite_N),
        "correction": correction_N.sum(),
        "correction_square": correction_N.square().sum(),
    }
    return correction_N, metrics


def off_policy_mask(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    row_N: Tensor,
    *,
    num_rows: int,
    delta: float,
) -> tuple[Tensor, Metrics]:
    """0 for the tokens of a bad response that the policy has moved away from, 1 elsewhere.

    A response is dropped where its advantage is below 0 and the mean over its tokens of log(pi_old
    / pi) is above `delta` (nats per token): it would push down what the policy hardly says any more
    (DeepSeek-V3.2, arXiv 2512.02556, section 3.1, "off-policy sequence masking"). `old_logp_N` is
    of the policy that sampled, `logp_N` of the current one; a token whose difference is not finite
    counts as 0 in the sum, as in TRL. Multiply the result into `correction_N`. All tokens of a row
    must be in the same call. An advantage that differs within a row is looked at token by token.

    Returns `(mask_N, metrics)`, detached; `off_policy_masked` counts the tokens that are dropped.
    Raises ValueError for a negative `delta` or shapes that differ.
    """
    same_shape(logp_N=logp_N, old_logp_N=old_logp_N, advantage_N=advantage_N, row_N=row_N)
    if not delta >= 0:
        raise ValueError(f"delta: {delta} must be at least 0, in nats per token")
    drift_N = (old_logp_N - logp_N).detach()
    drift_N = torch.where(torch.isfinite(drift_N), drift_N, 0)
    # Tokens that were cleared count in the divisor as well.
    mean_B = row_means(drift_N, row_N, num_rows, torch.ones_like(row_N, dtype=torch.bool))
    dropped_N = (advantage_N.detach() < 0) & (mean_B[row_N] > delta)
    mask_N = (~dropped_N).to(drift_N.dtype)
    return mask_N, {"off_policy_masked": dropped_N.sum().to(drift_N.dtype)}
