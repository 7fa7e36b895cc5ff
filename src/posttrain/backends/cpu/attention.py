"""Attention of rows of some hundred tokens, as products of large matrices.

torch's fused attention on CPU computes the whole square in small tiles, and reaches a fourth of the
speed of products in bfloat16; its backward pass, less. Here a block of queries is multiplied with
all keys up to its last one, so that little more than the lower triangle is computed, and the query
heads that read the same keys are one matrix. Like the fused one it keeps no weights for the
backward pass, which computes them again.

Scores and weights are rounded to the type of the queries; what `softmax`, its gradient and products
add up is float32 at least.

Legend: C bins, T positions of a bin, Q query heads, H key-value heads, G query heads that read one
key-value head, E head dimension, A = C * H, R = T * G; of a block of queries B positions, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

QUERIES = 64
"""Positions of a block: few, so that little is computed in vain; enough for products at speed."""


def causal_attention(
    query_CTQE: Tensor, key_CTHE: Tensor, value_CTHE: Tensor, mask_C1TT: Tensor | None, scale: float
) -> Tensor:
    """`[C, T, Q, E]`: softmax attention to earlier positions and one's own, differentiable.

    `mask_C1TT` is added to the scores and hides all later positions itself, or is None where these
    alone are hidden. Every query has to see its own position. Query heads that read the same keys
    are neighbours.
    """
    attended: Tensor = _CausalAttention.apply(  # type: ignore[no-untyped-call]
        query_CTQE, key_CTHE, value_CTHE, mask_C1TT, scale
    )
    return attended


class _CausalAttention(torch.autograd.Function):
    """Keeps queries, keys and values, each head's in a matrix of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        query_CTQE: Tensor,
        key_CTHE: Tensor,
        value_CTHE: Tensor,
        mask_C1TT: Tensor | None,
        scale: float,
    ) -> Tensor:
        bins, positions, heads = key_CTHE.shape[:3]
        # Scaled before the product: exact for head dimensions that are powers of four.
        query_ARE = _by_head(query_CTQE, heads) * scale
        key_ATE, value_ATE = _by_head(key_CTHE, heads), _by_head(value_CTHE, heads)
        attended_ARE = torch.empty_like(query_ARE)
        group = query_ARE.shape[1] // positions
        for at_B, at_R in _blocks(positions, group):
            weight_ARK = _weights(query_ARE[:, at_R], key_ATE, mask_C1TT, at_B, group)
            attended_ARE[:, at_R] = torch.bmm(weight_ARK, value_ATE[:, : at_B.stop])
        ctx.save_for_backward(query_ARE, key_ATE, value_ATE, mask_C1TT)
        ctx.scale, ctx.bins = scale, bins
        return _by_position(attended_ARE, bins, positions)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_ARE, key_ATE, value_ATE, mask_C1TT = ctx.saved_tensors
        positions = key_ATE.shape[1]
        group = query_ARE.shape[1] // positions
        grad_ARE = _by_head(grads[0], key_ATE.shape[0] // ctx.bins)
        grad_query_ARE = torch.empty_like(query_ARE)
        dtype = torch.promote_types(key_ATE.dtype, torch.float32)
        # Every block adds to its keys and values.
        grad_key_ATE = torch.zeros_like(key_ATE, dtype=dtype)
        grad_value_ATE = torch.zeros_like(value_ATE, dtype=dtype)
        for at_B, at_R in _blocks(positions, group):
            seen = slice(0, at_B.stop)
            block_ARE, given_ARE = query_ARE[:, at_R], grad_ARE[:, at_R]
            weight_ARK = _weights(block_ARE, key_ATE, mask_C1TT, at_B, group)
            grad_value_ATE[:, seen] += torch.bmm(weight_ARK.transpose(1, 2), given_ARE)
            slope_ARK = torch.bmm(given_ARE, value_ATE[:, seen].transpose(1, 2))
            slope_ARK = torch._softmax_backward_data(slope_ARK, weight_ARK, -1, weight_ARK.dtype)
            grad_query_ARE[:, at_R] = torch.bmm(slope_ARK, key_ATE[:, seen])
            grad_key_ATE[:, seen] += torch.bmm(slope_ARK.transpose(1, 2), block_ARE)
        gradients = (
            grad_query_ARE.mul_(ctx.scale),
            grad_key_ATE.to(key_ATE.dtype),
            grad_value_ATE.to(value_ATE.dtype),
        )
        return (*(_by_position(one, ctx.bins, positions) for one in gradients), None, None)


def _weights(
    query_ARE: Tensor, key_ATE: Tensor, mask_C1TT: Tensor | None, at_B: slice, group: int
) -> Tensor:
    """`weight_ARK` of a block of queries, over the keys up to its last position."""
    score_ARK = torch.bmm(query_ARE, key_ATE[:, : at_B.stop].transpose(1, 2))
    if mask_C1TT is None:
        # Only the last keys of a block come after some of its queries.
        own_ARB = score_ARK[..., at_B.start :]
        later_BB = torch.full(own_ARB.shape[-1:] * 2, -torch.inf, dtype=own_ARB.dtype).triu(1)
        own_ARB += later_BB.repeat_interleave(group, 0)
    else:
        # [A, B * G, K] as [C, H, B, G, K].
        score_CHBGK = score_ARK.view(len(mask_C1TT), -1, at_B.stop - at_B.start, group, at_B.stop)
        score_CHBGK += mask_C1TT[:, :, at_B, None, : at_B.stop]
    return torch.softmax(score_ARK, -1)


def _blocks(positions: int, group: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of positions, and where the queries of each stand."""
    for begin in range(0, positions, QUERIES):
        end = min(begin + QUERIES, positions)
        yield slice(begin, end), slice(begin * group, end * group)


def _by_head(states_CTQE: Tensor, heads: int) -> Tensor:
    """`[A, R, E]`, contiguous: of each position the heads that read the same keys together."""
    # [C, T, Q, E] -> [C, T, H, G, E] -> [C, H, T, G, E].
    states_CHTGE = states_CTQE.unflatten(2, (heads, -1)).transpose(1, 2)
    return states_CHTGE.flatten(2, 3).flatten(0, 1)


def _by_position(states_ARE: Tensor, bins: int, positions: int) -> Tensor:
    """`[C, T, Q, E]` of `[A, R, E]`."""
    states_CHTGE = states_ARE.unflatten(1, (positions, -1)).unflatten(0, (bins, -1))
    return states_CHTGE.transpose(1, 2).flatten(2, 3)
