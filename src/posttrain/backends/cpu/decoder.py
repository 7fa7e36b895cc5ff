"""Reading one more token of many rows at once: the seam under the sampler, and its general form.

A decoder keeps what it has read of every row in a slot. Rows stand in slots 0..L-1, each at a
length of its own, so that any of them can leave or be replaced between two steps.

Legend: P prompts, L rows in slots, M rows that move, T positions, D hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from posttrain.backends.cpu.cache import SlotCache


class Decoder(Protocol):
    """One model with the keys and values of all rows that are being sampled."""

    def prefill(self, tokens_PT: Tensor, length_P: Tensor, *, first: int, copies: int) -> Tensor:
        """Read right-padded prompts; copy c of prompt p goes to slot `first + p * copies + c`.

        Returns `hidden_PD`, which predicts the token after each prompt.
        """
        ...

    def step(self, token_L: Tensor, length_L: Tensor) -> Tensor:
        """Read one token of every row in slots 0..L-1; `length_L` counts those before it.

        Returns `hidden_LD`, which predicts the token after it.
        """
        ...

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        """Copy slots `source_M` to slots `target_M`; no slot is in both."""
        ...


class TransformersDecoder:
    """Any full-attention transformers model, through its own forward pass and a `SlotCache`."""

    def __init__(self, model: Any, *, num_slots: int, num_positions: int) -> None:
        self.model = model
        self.cache = SlotCache(model.config.num_hidden_layers, num_slots, num_positions)

    def prefill(self, tokens_PT: Tensor, length_P: Tensor, *, first: int, copies: int) -> Tensor:
        """See `Decoder.prefill`."""
        hidden_PD, prefilled = read_prompts(self.model, tokens_PT, length_P)
        copy_L = torch.arange(len(length_P), device=tokens_PT.device).repeat_interleave(copies)
        slot_L = torch.arange(first, first + len(copy_L), device=tokens_PT.device)
        self.cache.fill(slot_L, prefilled, copy_L)
        return hidden_PD

    def step(self, token_L: Tensor, length_L: Tensor) -> Tensor:
        """See `Decoder.step`."""
        mask = self.cache.aim(length_L)
        hidden_L1D: Tensor = self.model.base_model(
            input_ids=token_L[:, None],
            position_ids=length_L[:, None],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden_L1D[:, 0]

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        """See `Decoder.move`."""
        self.cache.move(source_M, target_M)


def read_prompts(model: Any, tokens_PT: Tensor, length_P: Tensor) -> tuple[Tensor, DynamicCache]:
    """One forward pass over right-padded prompts: `hidden_PD` of their last tokens, and the cache.

    Padding comes after the real tokens, so causal attention keeps it out; what it leaves in the
    cache is overwritten by the response, or never looked at.
    """
    prefilled = DynamicCache()
    hidden_PTD = model.base_model(
        input_ids=tokens_PT, past_key_values=prefilled, use_cache=True
    ).last_hidden_state
    prompt_P = torch.arange(len(length_P), device=tokens_PT.device)
    return hidden_PTD[prompt_P, length_P - 1], prefilled
