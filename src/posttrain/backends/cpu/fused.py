"""The fast path of sampling: one decode step of a Llama-like model in few, large operations.

A transformers layer is written to be read and changed; a decode step through it spends most of its
time between operations. Here the weights that read the same input are one matrix, the weights of
the norms before them are folded in, and attention is two batched products over preallocated slots.
The numbers agree with the model's own forward pass to rounding.

Legend: P prompts, L rows in slots, M rows that move, S slots, T positions, D hidden, F feed-forward
size, Q query heads, H key-value heads, J both, G query heads per key-value head, C head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from posttrain.backends.architecture import path_of
from posttrain.backends.cpu.cache import ROUND, Cache
from posttrain.backends.cpu.product import Product

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
HEADS = ("ForCausalLM", "ForSequenceClassification")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles do not depend on how long a row has become."""
READ_BYTES = 2**28
"""What the widest activation may take while prompts are read: more of them are read in parts."""


def is_fusable(model: Any) -> bool:
    """Whether `FusedDecoder` computes this model: attention, class, positions and activation."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        path_of(model) == "packed"
        and type(model).__name__ in [family + head for family in FAMILIES for head in HEADS]
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in ROPE_TYPES
    )


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """The weights of one decoder layer, joined where they read the same input."""

    qkv: Product
    qk_scale_JC: Tensor | None
    """Weights of the query and key norms where the model has them."""
    out: Product
    gate_up: Product
    down: Product
    epsilon: float
    qk_epsilon: float


def _join_layer(layer: Any, scale: float) -> _Layer:
    """`scale` is attention's; it goes into whatever the queries are multiplied by last."""
    attention, mlp = layer.self_attn, layer.mlp
    has_norms = hasattr(attention, "q_norm")
    # A norm on the queries would undo a scale before it.
    query_scale = 1.0 if has_norms else scale
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    # `cat` copies, so the products in place below leave the weights of the model alone.
    weight_JD = torch.cat([module.weight for module in qkv])
    bias_J = None
    if attention.q_proj.bias is not None:
        bias_J = torch.cat([module.bias for module in qkv])
        bias_J[: len(attention.q_proj.bias)] *= query_scale
    weight_JD[: len(attention.q_proj.weight)] *= query_scale
    # (x * g) @ W.T = x @ (W * g).T: the weight of a norm belongs to the columns.
    weight_JD *= layer.input_layernorm.weight
    gate_up_FD = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    gate_up_FD *= layer.post_attention_layernorm.weight
    gate_up_bias_F = None
    if mlp.gate_proj.bias is not None:
        gate_up_bias_F = torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias])
    qk_scale_JC = None
    if has_norms:
        width = attention.head_dim
        queries = len(attention.q_proj.weight) // width
        keys = len(attention.k_proj.weight) // width
        # [C] -> [J, C]: the weight of a norm once for each head, queries before keys.
        qk_scale_JC = torch.cat(
            [
                (attention.q_norm.weight * scale).expand(queries, width),
                attention.k_norm.weight.expand(keys, width),
            ]
        )
    return _Layer(
        qkv=Product(weight_JD, bias_J),
        qk_scale_JC=qk_scale_JC,
        out=Product(attention.o_proj.weight, attention.o_proj.bias),
        gate_up=Product(gate_up_FD, gate_up_bias_F),
        down=Product(mlp.down_proj.weight, mlp.down_proj.bias),
        epsilon=layer.input_layernorm.variance_epsilon,
        qk_epsilon=attention.q_norm.variance_epsilon if has_norms else 0.0,
    )


class FusedDecoder:
    """One model with the keys and values of all rows that are being sampled, each in a slot.

    Rows stand in slots 0..L-1, each at a length of its own, so that any of them can leave, move or
    be replaced between two steps. For the models that `is_fusable` accepts; copies most weights
    once.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        *,
        num_slots: int,
        num_positions: int,
        cache: Cache | None = None,
        read_bytes: int = READ_BYTES,
    ) -> None:
        """`num_positions` is the most that a row may have; `cache` that of an earlier decoder of
        this model, to be used again if it fits. Prompts are read so many at a time that the widest
        numbers of a layer take `read_bytes` at most."""
        self.model, self.read_bytes = model, read_bytes
        body = model.model
        attention = body.layers[0].self_attn
        self.width = attention.head_dim
        self.num_keys = len(attention.k_proj.weight) // self.width
        self.num_queries = len(attention.q_proj.weight) // self.width
        self.layers = [_join_layer(layer, attention.scaling) for layer in body.layers]
        embedding_VD = body.embed_tokens.weight
        # A few shapes only, so that an earlier cache fits and products find the same alignment.
        num_positions = -(-num_positions // ROUND) * ROUND
        shape = (len(self.layers), 2, num_slots, self.num_keys, num_positions, self.width)
        if cache is None or not cache.take_over(shape):
            cache = Cache(shape, embedding_VD)
        self.cache = cache
        """Keys and values of every layer."""
        self.visible = 0
        """Positions that hold anything, in any slot."""
        self._lay_out()

    def _lay_out(self) -> None:
        """What follows from the place and the number of the cache's positions."""
        buffer, embedding_VD = self.cache.tensor, self.model.model.embed_tokens.weight
        self.states = [layer_2SHTC.unbind() for layer_2SHTC in buffer]
        slots, keys, positions = buffer.shape[2:5]
        # In vectors of C numbers. The keys of all slots come first, then the values.
        key_H = torch.arange(keys, device=embedding_VD.device) * positions
        self.offset_J = torch.cat((key_H, key_H + slots * keys * positions))
        """Where the keys and values of slot 0 begin when one layer's are laid end to end."""
        position_1T = torch.arange(positions, device=embedding_VD.device)[None]
        cos_1TC, sin_1TC = self.model.model.rotary_emb(embedding_VD, position_1T)
        self.cos_T1C = cos_1TC[0, :, None].contiguous()
        sign_C = sin_1TC.new_ones(self.width)
        sign_C[: self.width // 2] = -1
        # rotate_half(x) * sin is swapped(x) * (sign * sin), which needs no negation of x.
        self.sin_T1C = (sin_1TC[0] * sign_C)[:, None].contiguous()

    def prefill(self, tokens_PT: Tensor, length_P: Tensor, *, first: int, copies: int) -> Tensor:
        """Read right-padded prompts; copy c of prompt p goes to slot `first + p * copies + c`.

        Returns `hidden_PD`, which predicts the token after each prompt.
        """
        prompts, columns = tokens_PT.shape
        config = self.model.config
        size = columns * config.intermediate_size * self.cache.tensor.element_size()
        at_once = max(1, min(READ_BYTES, self.read_bytes) // size)
        parts = [
            self._read(
                tokens_PT[start : start + at_once],
                length_P[start : start + at_once],
                first=first + start * copies,
                copies=copies,
            )
            for start in range(0, prompts, at_once)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, tokens_PT: Tensor, length_P: Tensor, *, first: int, copies: int) -> Tensor:
        """`prefill` of some prompts in one forward pass."""
        # Padding comes after the real tokens, so causal attention keeps it out; what it leaves in
        # the cache is overwritten by the response, or never looked at.
        prefilled = DynamicCache()
        hidden_PTD = self.model.base_model(
            input_ids=tokens_PT, past_key_values=prefilled, use_cache=True
        ).last_hidden_state
        prompt_P = torch.arange(len(length_P), device=tokens_PT.device)
        # [P, T, D] -> [P, D]: at the last token of each prompt.
        hidden_PD: Tensor = hidden_PTD[prompt_P, length_P - 1]
        prompts, columns = tokens_PT.shape
        self._reach(max(self.visible, columns))
        slots = slice(first, first + prompts * copies)
        for states, layer in zip(self.states, prefilled.layers, strict=True):
            for state_SHTC, source_PHTC in zip(states, (layer.keys, layer.values), strict=True):
                # A view of the slots: [P * copies, H, T, C] as [P, copies, H, T, C].
                copies_PLHTC = state_SHTC[slots, :, :columns].unflatten(0, (prompts, copies))
                copies_PLHTC.copy_(source_PHTC[:, None])
        return hidden_PD

    def step(self, token_L: Tensor, length_L: Tensor) -> Tensor:
        """Read one token of every row in slots 0..L-1; `length_L` counts those before it.

        Returns `hidden_LD`, which predicts the token after it.
        """
        self._reach(int(length_L.max()) + 1)
        rows = len(token_L)
        hidden_LD = self.model.model.embed_tokens.weight[token_L]
        position_T = torch.arange(self.visible, device=token_L.device)
        mask_LT = torch.zeros(rows, self.visible, dtype=hidden_LD.dtype, device=token_L.device)
        # The new token stands at position `length` and sees itself.
        mask_LT.masked_fill_(position_T > length_L[:, None], -torch.inf)
        stride = self.num_keys * self.cache.positions
        slot_L = torch.arange(0, rows * stride, stride, device=token_L.device)
        # [L, 1] + [2 H] -> [M]: where the new keys and values of each row go.
        index_M = ((slot_L + length_L)[:, None] + self.offset_J).flatten()
        cos_L1C, sin_L1C = self.cos_T1C[length_L], self.sin_T1C[length_L]
        for layer, cache, states in zip(self.layers, self.cache.tensor, self.states, strict=True):
            normed_LD = _normalised(hidden_LD, layer.epsilon)
            heads_LJC = layer.qkv(normed_LD).view(rows, -1, self.width)
            self._turn(heads_LJC[:, : self.num_queries + self.num_keys], layer, cos_L1C, sin_L1C)
            # [L, 2 H, C] -> [M, C], in the order of `index_M`.
            fresh_MC = heads_LJC[:, self.num_queries :].reshape(-1, self.width)
            cache.view(-1, self.width).index_copy_(0, index_M, fresh_MC)
            attended_LJ = self._attend(heads_LJC[:, : self.num_queries], states, mask_LT)
            hidden_LD = layer.out(attended_LJ).add_(hidden_LD)
            normed_LD = _normalised(hidden_LD, layer.epsilon)
            gate_LF, up_LF = layer.gate_up(normed_LD).chunk(2, dim=1)
            inner_LF = functional.silu(gate_LF).mul_(up_LF)
            hidden_LD = layer.down(inner_LF).add_(hidden_LD)
        normed_LD: Tensor = self.model.model.norm(hidden_LD)
        return normed_LD

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        """Copy slots `source_M` to slots `target_M`; no slot is in both."""
        used = self.cache.tensor[:, :, :, :, : self.visible]
        used.index_copy_(2, target_M, used.index_select(2, source_M))

    def _reach(self, positions: int) -> None:
        """Have room for so many positions, all of which are now to be seen."""
        self.visible = positions
        if self.cache.reach(positions):
            self._lay_out()

    def _turn(self, heads_LJC: Tensor, layer: _Layer, cos_L1C: Tensor, sin_L1C: Tensor) -> None:
        """Normalise queries and keys where the model does, and rotate them, in place."""
        if layer.qk_scale_JC is not None:
            heads_LJC.mul_(_inverse_size(heads_LJC, layer.qk_epsilon)).mul_(layer.qk_scale_JC)
        half = self.width // 2
        swapped_LJC = torch.cat((heads_LJC[..., half:], heads_LJC[..., :half]), dim=-1)
        heads_LJC.mul_(cos_L1C).addcmul_(swapped_LJC, sin_L1C)

    def _attend(self, query_LQC: Tensor, states: tuple[Tensor, ...], mask_LT: Tensor) -> Tensor:
        """Softmax attention of the new queries over all visible keys: `[L, Q * C]`."""
        rows, visible = mask_LT.shape
        key_LHTC, value_LHTC = (state_SHTC[:rows, :, :visible] for state_SHTC in states)
        # [L, Q, C] -> [L, H, G, C]: the queries that read the same keys.
        # Attention has its scale already: it is in the weights of the queries.
        query_LHGC = query_LQC.unflatten(1, (self.num_keys, -1))
        weight_LHGT = torch.matmul(query_LHGC, key_LHTC.transpose(2, 3))
        weight_LHGT += mask_LT[:, None, None]
        weight_LHGT = torch.softmax(weight_LHGT, dim=-1)
        return torch.matmul(weight_LHGT, value_LHTC).flatten(1)


def _inverse_size(input: Tensor, epsilon: float) -> Tensor:
    """1 / root mean square along the last axis, with the epsilon of the model's norm.

    At least float32, as in the models' own norms.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    size = torch.linalg.vector_norm(input, dim=-1, keepdim=True, dtype=dtype)
    return size.square_().mul_(1 / input.shape[-1]).add_(epsilon).rsqrt_()


def _normalised(hidden_LD: Tensor, epsilon: float) -> Tensor:
    """RMSNorm without its weight, which is folded into the linear layer after it."""
    return (hidden_LD * _inverse_size(hidden_LD, epsilon)).to(hidden_LD.dtype)
