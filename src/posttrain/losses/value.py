"""The critic's loss: clipped regression of values onto returns, and how much it explains.

Returns and advantages come from `posttrain.rl.gae`.

Shape suffixes: N flat response tokens of all rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from posttrain.losses.ops import Metrics, active_sum, same_shape, weighted_sum


def clipped_value(
    value_N: Tensor,
    old_value_N: Tensor,
    return_N: Tensor,
    weight_N: Tensor,
    *,
    clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Sum of `weight / 2 * max((V - R)^2, (V_clip - R)^2)`, V_clip within `clip` of the old value.

    V_clip = clamp(V, V_old - clip, V_old + clip): a value that has moved further than `clip` in the
    direction of its return gets no gradient (the PPO of OpenAI Baselines; Huang et al., "The 37
    implementation details of PPO", 2022, detail 9). None is the plain squared error.

    `value_N` is differentiable; `old_value_N` (from before the updates on the batch), `return_N`
    and `weight_N` are constants.

    Metrics, sums over the tokens of non-zero weight: `value_clipped` (how many tokens the clip
    stops; 0 for None), `value`, and for `explained_variance` the moments `value_tokens` (their
    number), `return`, `return_square`, `value_error` (R - V), `value_error_square`. Raises
    ValueError for a `clip` that is not positive or shapes that differ.
    """
    same_shape(value_N=value_N, old_value_N=old_value_N, return_N=return_N, weight_N=weight_N)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: {clip} must be above 0, in units of the reward, or None")
    active_N = weight_N != 0
    # Before any arithmetic: what is not finite at weight 0 would be NaN in the gradient.
    return_N = torch.where(active_N, return_N.detach(), 0)
    old_value_N = torch.where(active_N, old_value_N.detach(), 0)
    value_N = torch.where(active_N, value_N, 0)
    square_N = (value_N - return_N).square()
    stopped_N = torch.zeros_like(active_N)
    if clip is not None:
        clipped_N = old_value_N + (value_N - old_value_N).clamp(-clip, clip)
        clipped_square_N = (clipped_N - return_N).square()
        moved_N = (value_N - old_value_N).abs() > clip
        stopped_N = moved_N & (clipped_square_N > square_N)
        # The larger one: a value that moved away from its return still gets a gradient.
        square_N = torch.maximum(square_N, clipped_square_N)
    error_N = return_N - value_N
    metrics = {
        "value_clipped": active_sum(stopped_N.to(value_N.dtype), weight_N),
        "value": active_sum(value_N, weight_N),
        "value_tokens": active_sum(torch.ones_like(value_N), weight_N),
        "return": active_sum(return_N, weight_N),
        "return_square": active_sum(return_N.square(), weight_N),
        "value_error": active_sum(error_N, weight_N),
        "value_error_square": active_sum(error_N.square(), weight_N),
    }
    return weighted_sum(0.5 * square_N, weight_N), metrics


def explained_variance(metrics: Mapping[str, Tensor | float]) -> float:
    """1 - Var(R - V) / Var(R), from the summed metrics of `clipped_value`; over tokens.

    1: the values are the returns, up to a constant. 0: no better than a constant. Below 0: worse.
    Returns 0 where the returns are all equal, to the rounding of float32.
    """
    count = max(float(metrics["value_tokens"]), 1.0)

    def variance(name: str) -> float:
        mean = float(metrics[name]) / count
        # The difference of two means can fall below 0 by rounding.
        return max(float(metrics[f"{name}_square"]) / count - mean**2, 0.0)

    # Below this a difference of float32 sums is rounding alone.
    if variance("return") <= 1e-6 * float(metrics["return_square"]) / count:
        return 0.0
    return 1 - variance("value_error") / variance("return")
