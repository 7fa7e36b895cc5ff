"""Importance corrections for tokens that were sampled by a numerically different policy.

The engine that samples and the one that trains compute slightly different log-probabilities
(kernels, precision, weights one step old). The ratio r = pi_train / pi_sampler of a token, cut off,
makes the policy gradient right again.

Shape suffixes: N flat response tokens of all rows.
"""

from typing import Literal

import torch
from torch import Tensor

from posttrain.losses.ops import Metrics, known_choice, same_shape

CorrectionMode = Literal["none", "truncated", "icepop"]


def importance_correction(
    train_logp_N: Tensor,
    sampler_logp_N: Tensor,
    *,
    mode: CorrectionMode,
    low: float,
    high: float,
) -> tuple[Tensor, Metrics]:
    """The detached factor of each token's loss, from r = exp(train_logp - sampler_logp).

    - `none`: 1.
    - `truncated`: min(r, high); `low` is not read (truncated importance sampling; high = 2 is
      usual).
    - `icepop`: r if low <= r <= high, else 0 (MiMo-V2-Flash, arXiv 2601.02780, Eq. 8; [0.5, 5] and
      [0.2, 5] are usual).

    A token whose log r is not finite (the sampler says -inf or NaN) is masked by the latter two.

    Metrics, sums over tokens: `correction_masked` (factor 0), `correction_truncated` (cut to
    `high`), `sampler_ratio` (r, finite ones), `correction` and `correction_square` of the factor;
    the effective share of the sample is correction**2 / (correction_square * N). Raises ValueError
    for another mode, shapes that differ, or unless 0 <= low <= 1 <= high.
    """
    known_choice("mode", mode, CorrectionMode)
    same_shape(train_logp_N=train_logp_N, sampler_logp_N=sampler_logp_N)
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"low: {low}, high: {high}; must be 0 <= low <= 1 <= high")
    log_ratio_N = (train_logp_N - sampler_logp_N).detach()
    finite_N = torch.isfinite(log_ratio_N)
    ratio_N = torch.where(finite_N, log_ratio_N.exp(), 0)
    cut_N = torch.zeros_like(finite_N)
    if mode == "none":
        correction_N = torch.ones_like(ratio_N)
    elif mode == "truncated":
        cut_N = ratio_N > high
        correction_N = ratio_N.clamp(max=high)
    else:
        keep_N = finite_N & (ratio_N >= low) & (ratio_N <= high)
        correction_N = torch.where(keep_N, ratio_N, 0)
    metrics = {
        "correction_masked": (correction_N == 0).sum().to(ratio_N.dtype),
        "correction_truncated": cut_N.sum().to(ratio_N.dtype),
        "sampler_ratio": ratio_N.sum(),
        "correction": correction_N.sum(),
        "correction_square": correction_N.square().sum(),
    }
    return correction_N, metrics
