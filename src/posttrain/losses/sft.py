"""Supervised fine-tuning: cross-entropy on the response tokens.

Shape suffixes: N flat response tokens of all rows.
"""

from torch import Tensor

from posttrain.losses.ops import Metrics, active_sum, same_shape, weighted_sum


def cross_entropy(logp_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Metrics]:
    """Sum of `-weight * logp` (nats) over tokens.

    `logp_N` are the log-probabilities of the demonstrated tokens
    (`posttrain.losses.ops.token_logprobs`), `weight_N` their weights (`aggregation_weights`, or 0
    for a token that does not count). Metrics: `nll`, the unweighted sum of `-logp` over counted
    tokens.
    """
    same_shape(logp_N=logp_N, weight_N=weight_N)
    return -weighted_sum(logp_N, weight_N), {"nll": active_sum(-logp_N, weight_N)}
