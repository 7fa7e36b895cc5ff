"""A forward pass over just the tokens that are needed: only attention ever sees bins.

The linear layers of a Llama-like model do not care which row a token belongs to, so all tokens of a
pass stand in one row, end to end. Attention, which transformers looks up by name, lays queries,
keys and values into bins, one width after another, and takes the results back out. The numbers are
those of the bins alone; nothing is computed for padding but attention itself.

Legend: M tokens, W those that predict, Q query heads, H key-value heads, D hidden, C bins,
T positions of a bin, E head dimension, N flat response tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from posttrain.backends.fused import is_fusable
from posttrain.backends.packing import Packed

NAME = "posttrain_flat"


def is_flat(model: Any) -> bool:
    """Whether this model's layers but attention treat every token alike and pass options on."""
    return is_fusable(model)


def together(parts: Iterable[Packed], max_tokens: int) -> Iterator[tuple[Packed, ...]]:
    """Parts that make up one forward pass: as many as have `max_tokens` tokens, at least one."""
    chosen: list[Packed] = []
    for part in parts:
        if chosen and sum(len(p.at_M) for p in [*chosen, part]) > max_tokens:
            yield tuple(chosen)
            chosen = []
        chosen.append(part)
    if chosen:
        yield tuple(chosen)


def hidden_states(model: Any, parts: Sequence[Packed]) -> Tensor:
    """`hidden_ND`: last hidden states that predict the response tokens, part after part.

    In the last layer only these positions go on; of all others it needs keys and values alone.
    """
    tokens_1M = torch.cat([part.tokens_CT.flatten()[part.at_M] for part in parts])[None]
    position_1M = torch.cat([part.position_CT.flatten()[part.at_M] for part in parts])[None]
    blocks, predicts, start = [], [], 0
    for part in parts:
        block = _Block(part, start, model.dtype)
        predicts.append(start + block.flat_S[part.predicts_N])
        blocks.append(block)
        start += len(part.at_M)
    wanted_W, place_N = torch.cat(predicts).unique(return_inverse=True)
    body = model.base_model
    hidden_1MD = body.embed_tokens(tokens_1M)
    rotation = body.rotary_emb(hidden_1MD, position_1M)
    with _attention(model):
        for layer in body.layers[:-1]:
            hidden_1MD = layer(
                hidden_1MD,
                attention_mask=None,
                position_embeddings=rotation,
                attention_blocks=blocks,
            )
    hidden_WD = _last_layer(body.layers[-1], hidden_1MD, rotation, blocks, wanted_W)
    hidden_ND: Tensor = body.norm(hidden_WD).index_select(0, place_N)
    return hidden_ND


def _last_layer(
    layer: Any,
    hidden_1MD: Tensor,
    rotation: tuple[Tensor, Tensor],
    blocks: Sequence[_Block],
    wanted_W: Tensor,
) -> Tensor:
    """The layer's output `[W, D]` at the tokens `wanted_W` (ascending)."""
    attention = layer.self_attn
    normed_1MD = layer.input_layernorm(hidden_1MD)
    query_1WD = attention.q_proj(normed_1MD.index_select(1, wanted_W))
    heads = [
        projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projected in (query_1WD, attention.k_proj(normed_1MD), attention.v_proj(normed_1MD))
    ]
    query_1QWE, key_1HME, value_1HME = heads
    if hasattr(attention, "q_norm"):
        query_1QWE, key_1HME = attention.q_norm(query_1QWE), attention.k_norm(key_1HME)
    cos_1ME, sin_1ME = rotation
    key_1HME = _rotated(key_1HME, cos_1ME, sin_1ME)
    query_1QWE = _rotated(query_1QWE, cos_1ME[:, wanted_W], sin_1ME[:, wanted_W])
    wanted_blocks = [block.at(wanted_W) for block in blocks]
    attended_1WQE, _ = attend(
        attention,
        query_1QWE,
        key_1HME,
        value_1HME,
        None,
        scaling=attention.scaling,
        attention_blocks=wanted_blocks,
    )
    hidden_WD = hidden_1MD[0].index_select(0, wanted_W)
    hidden_WD = hidden_WD + attention.o_proj(attended_1WQE[0].flatten(1))
    output_WD: Tensor = hidden_WD + layer.mlp(layer.post_attention_layernorm(hidden_WD))
    return output_WD


def _rotated(states_1HME: Tensor, cos_1ME: Tensor, sin_1ME: Tensor) -> Tensor:
    """Rotary positions as all models of `is_flat` have them."""
    first, second = states_1HME.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states_1HME * cos_1ME[:, None] + turned * sin_1ME[:, None]


class _Block:
    """Where the tokens of one part stand, in the row and in its bins, and its mask."""

    def __init__(self, part: Packed, start: int, dtype: torch.dtype) -> None:
        self.shape, self.at_M = part.tokens_CT.shape, part.at_M
        self.tokens = slice(start, start + len(part.at_M))
        self.flat_S = torch.zeros(part.tokens_CT.numel(), dtype=torch.int64)
        """For each position of the bins its token; any token where there is none."""
        self.flat_S[part.at_M] = torch.arange(len(part.at_M))
        self.mask = part.mask(dtype)
        # Where queries come from and what is taken out: all tokens, or those of `at`.
        self.query_tokens, self.query_S = self.tokens, self.flat_S

    def at(self, wanted_W: Tensor) -> _Block:
        """The same keys and values for the queries of the tokens `wanted_W` alone."""
        inside_W = (wanted_W >= self.tokens.start) & (wanted_W < self.tokens.stop)
        first, count = int((wanted_W < self.tokens.start).sum()), int(inside_W.sum())
        block = copy(self)
        block.at_M = self.at_M[wanted_W[inside_W] - self.tokens.start]
        block.query_tokens = slice(first, first + count)
        block.query_S = torch.zeros_like(self.flat_S)
        block.query_S[block.at_M] = torch.arange(count)
        return block

    def queries(self, states_1HWE: Tensor) -> Tensor:
        """The states of this part's queries in bins, `[C, H, T, E]`."""
        return self._lay_out(states_1HWE, self.query_tokens, self.query_S)

    def keys(self, states_1HME: Tensor) -> Tensor:
        """The states of this part's tokens in bins, `[C, H, T, E]`."""
        return self._lay_out(states_1HME, self.tokens, self.flat_S)

    def take_out(self, states_CHTE: Tensor) -> Tensor:
        """The other way: `[W, H, E]` at this part's queries."""
        return states_CHTE.transpose(1, 2).flatten(0, 1).index_select(0, self.at_M)

    def _lay_out(self, states_1HME: Tensor, tokens: slice, flat_S: Tensor) -> Tensor:
        states_MHE = states_1HME[0].transpose(0, 1)[tokens]
        return states_MHE.index_select(0, flat_S).unflatten(0, self.shape).transpose(1, 2)


def attend(
    module: Any,
    query_1QME: Tensor,
    key_1HME: Tensor,
    value_1HME: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention_blocks: Sequence[_Block],
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within bins, in transformers' terms: `([1, M, Q, E], None)`."""
    repeats = query_1QME.shape[1] // key_1HME.shape[1]
    outputs = []
    for block in attention_blocks:
        query = block.queries(query_1QME)
        key, value = block.keys(key_1HME), block.keys(value_1HME)
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        states_CHTE = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=block.mask, scale=scaling, is_causal=block.mask is None
        )
        outputs.append(block.take_out(states_CHTE))
    return torch.cat(outputs)[None], None


AttentionInterface.register(NAME, attend)


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
