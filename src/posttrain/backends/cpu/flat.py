"""A forward pass over just the tokens that are needed: only attention ever sees bins.

The linear layers of a Llama-like model do not care which row a token belongs to, so all tokens of a
pass stand end to end. Attention lays queries, keys and values into bins, one width after another,
and takes the results back out. In the last layer only the positions that predict something go on;
of all others it needs keys and values alone. The modules are the model's own; the numbers are those
of its own forward pass over the bins.

Legend: M tokens, W those that go on, Q query heads, H key-value heads, D hidden, C bins,
T positions of a bin, S positions of all bins of one width, E head dimension, N sampled tokens, B
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.cpu.packing import PackedPass
from posttrain.backends.recompute import recomputed


@dataclass(frozen=True, kw_only=True)
class FlatPass:
    """A `ForwardPass` over bins of several widths, for models that `fused.is_fusable` accepts."""

    parts: tuple[PackedPass, ...]

    @property
    def index_B(self) -> Tensor:
        """See `ForwardPass.index_B`."""
        return torch.cat([part.index_B for part in self.parts])

    @property
    def num_positions(self) -> int:
        """See `ForwardPass.num_positions`; there is no padding."""
        return sum(len(part.index_M) for part in self.parts)

    def hidden_states(self, model: Any, body: Any = None, *, checkpointing: bool = False) -> Tensor:
        """See `ForwardPass.hidden_states`. Calls the model's own modules one by one, so there is no
        use for `body`."""
        assert body is None, "a compiled model is given bins"
        parts = [part.to(model.device) for part in self.parts]
        return hidden_states(model, parts, checkpointing=checkpointing)


def hidden_states(
    model: Any, parts: Sequence[PackedPass], *, checkpointing: bool = False
) -> Tensor:
    """`hidden_ND`: last hidden states that predict the sampled tokens, part after part."""
    # All tokens of the pass end to end, without the gaps of the bins.
    tokens_M = torch.cat([part.tokens_CT.flatten()[part.index_M] for part in parts])
    position_M = torch.cat([part.position_CT.flatten()[part.index_M] for part in parts])
    blocks, predicts, start = [], [], 0
    for part in parts:
        block = _Block(part, start, model.dtype)
        # From positions of the bins to tokens of the whole pass.
        predicts.append(start + block.token_S[part.predicts_N])
        blocks.append(block)
        start += len(part.index_M)
    # Rows of a group share the token that predicts their first one: computed once, given to each.
    # They come out ascending, so that those of one part stand together.
    wanted_W, order_N = torch.cat(predicts).unique(return_inverse=True)
    body = model.base_model
    hidden_MD = body.embed_tokens(tokens_M)
    cos_1ME, sin_1ME = body.rotary_emb(hidden_MD, position_M[None])
    # [1, M, E] -> [M, 1, E]: the same for all heads.
    rotation = (cos_1ME[0, :, None], sin_1ME[0, :, None])
    # Every layer but the last gives all tokens on; the last has only the W that are asked for.
    run = partial(recomputed, _layer) if checkpointing else _layer
    for layer in body.layers[:-1]:
        hidden_MD = run(layer, hidden_MD, rotation, blocks, None)
    blocks = [block.at(wanted_W) for block in blocks]
    hidden_WD = run(body.layers[-1], hidden_MD, rotation, blocks, wanted_W)
    hidden_ND: Tensor = body.norm(hidden_WD).index_select(0, order_N)
    return hidden_ND


def _layer(
    layer: Any,
    hidden_MD: Tensor,
    rotation: tuple[Tensor, Tensor],
    blocks: Sequence[_Block],
    wanted_W: Tensor | None,
) -> Tensor:
    """One decoder layer; the output is `[W, D]` at the tokens `wanted_W` (ascending), or at all."""
    attention = layer.self_attn
    normed_MD = layer.input_layernorm(hidden_MD)
    cos_M1E, sin_M1E = rotation
    # [M, H * E] -> [M, H, E].
    key_MHE = attention.k_proj(normed_MD).unflatten(-1, (-1, attention.head_dim))
    value_MHE = attention.v_proj(normed_MD).unflatten(-1, (-1, attention.head_dim))
    cos_W1E, sin_W1E, hidden_WD = cos_M1E, sin_M1E, hidden_MD
    if wanted_W is not None:
        cos_W1E, sin_W1E = cos_M1E[wanted_W], sin_M1E[wanted_W]
        hidden_WD = hidden_MD.index_select(0, wanted_W)
        normed_MD = normed_MD.index_select(0, wanted_W)
    query_WQE = attention.q_proj(normed_MD).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        query_WQE, key_MHE = attention.q_norm(query_WQE), attention.k_norm(key_MHE)
    query_WQE = _rotated(query_WQE, cos_W1E, sin_W1E)
    key_MHE = _rotated(key_MHE, cos_M1E, sin_M1E)
    # One part after another is the order of the tokens. [W, Q, E] -> [W, Q * E].
    attended_WD = torch.cat(
        [block.attend(query_WQE, key_MHE, value_MHE, attention.scaling) for block in blocks]
    ).flatten(1)
    hidden_WD = hidden_WD + attention.o_proj(attended_WD)
    output_WD: Tensor = hidden_WD + layer.mlp(layer.post_attention_layernorm(hidden_WD))
    return output_WD


def _rotated(states_MHE: Tensor, cos_M1E: Tensor, sin_M1E: Tensor) -> Tensor:
    """Rotary positions as all models of `is_fusable` have them."""
    first, second = states_MHE.chunk(2, dim=-1)
    return states_MHE * cos_M1E + torch.cat((-second, first), dim=-1) * sin_M1E


class _Block:
    """Where the tokens of one part stand, end to end and in its bins, and its mask."""

    def __init__(self, part: PackedPass, start: int, dtype: torch.dtype) -> None:
        self.shape, self.index_M = part.tokens_CT.shape, part.index_M
        self.tokens = slice(start, start + len(part.index_M))
        self.token_S = torch.zeros_like(part.tokens_CT.flatten())
        """For each position of the bins its token; any token where there is none."""
        self.token_S[part.index_M] = torch.arange(len(part.index_M), device=part.index_M.device)
        self.mask = part.mask(dtype)
        # Where queries come from and what is taken out: all tokens, or those of `at`.
        self.query_tokens, self.query_S = self.tokens, self.token_S

    def at(self, wanted_W: Tensor) -> _Block:
        """The same keys and values for the queries of the tokens `wanted_W` alone."""
        inside_W = (wanted_W >= self.tokens.start) & (wanted_W < self.tokens.stop)
        # `wanted_W` is ascending, so the tokens of a part are one slice of it.
        first, count = int((wanted_W < self.tokens.start).sum()), int(inside_W.sum())
        block = copy(self)
        block.index_M = self.index_M[wanted_W[inside_W] - self.tokens.start]
        block.query_tokens = slice(first, first + count)
        block.query_S = torch.zeros_like(self.token_S)
        block.query_S[block.index_M] = torch.arange(count, device=block.index_M.device)
        return block

    def attend(
        self, query_WQE: Tensor, key_MHE: Tensor, value_MHE: Tensor, scaling: float
    ) -> Tensor:
        """Attention within the bins of this part, `[W, Q, E]` at its queries."""
        query_CQTE = self._lay_out(query_WQE[self.query_tokens], self.query_S)
        key_CHTE = self._lay_out(key_MHE[self.tokens], self.token_S)
        value_CHTE = self._lay_out(value_MHE[self.tokens], self.token_S)
        repeats = query_CQTE.shape[1] // key_CHTE.shape[1]
        if repeats > 1:
            # [C, H, T, E] -> [C, Q, T, E]: a key-value head serves neighbouring query heads.
            key_CHTE = key_CHTE.repeat_interleave(repeats, dim=1)
            value_CHTE = value_CHTE.repeat_interleave(repeats, dim=1)
        states_CQTE = torch.nn.functional.scaled_dot_product_attention(
            query_CQTE,
            key_CHTE,
            value_CHTE,
            attn_mask=self.mask,
            scale=scaling,
            is_causal=self.mask is None,
        )
        # [C, Q, T, E] -> [S, Q, E] -> [W, Q, E].
        return states_CQTE.transpose(1, 2).flatten(0, 1).index_select(0, self.index_M)

    def _lay_out(self, states_MHE: Tensor, token_S: Tensor) -> Tensor:
        # [M, H, E] -> [S, H, E] -> [C, T, H, E] -> [C, H, T, E].
        return states_MHE.index_select(0, token_S).unflatten(0, self.shape).transpose(1, 2)
