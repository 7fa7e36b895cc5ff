"""A key-value cache of fixed slots, each with its own length, for any full-attention model.

transformers' own caches keep all rows at one length, so a finished row stays until the last one
ends. Here every row writes at its own position: rows leave, move and are replaced at any step.

Legend: S slots, B rows in this call, M rows that move, H key-value heads, T positions, C head
dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache


class SlotLayer:
    """Keys and values of one layer; quacks like a transformers cache layer."""

    is_sliding = False
    is_compileable = False

    def __init__(self, num_slots: int, num_positions: int) -> None:
        self.shape = (num_slots, num_positions)
        self.keys_SHTC: Tensor | None = None
        self.values_SHTC: Tensor | None = None
        self.row_B = torch.empty(0, dtype=torch.int64)
        self.length_B = torch.empty(0, dtype=torch.int64)
        self.num_visible = 0

    def fill(self, slot_B: Tensor, keys_BHTC: Tensor, values_BHTC: Tensor) -> None:
        """Write whole prompts into slots."""
        if self.keys_SHTC is None or self.values_SHTC is None:
            num_slots, num_positions = self.shape
            _, heads, _, width = keys_BHTC.shape
            self.keys_SHTC = keys_BHTC.new_zeros(num_slots, heads, num_positions, width)
            self.values_SHTC = values_BHTC.new_zeros(
                num_slots, heads, num_positions, values_BHTC.shape[-1]
            )
        columns = keys_BHTC.shape[2]
        self.num_visible = max(self.num_visible, columns)
        self.keys_SHTC[slot_B, :, :columns] = keys_BHTC
        self.values_SHTC[slot_B, :, :columns] = values_BHTC

    def update(
        self, keys_BH1C: Tensor, values_BH1C: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: store one token per row, return all that is visible."""
        assert self.keys_SHTC is not None and self.values_SHTC is not None
        self.keys_SHTC[self.row_B, :, self.length_B] = keys_BH1C[:, :, 0]
        self.values_SHTC[self.row_B, :, self.length_B] = values_BH1C[:, :, 0]
        rows = len(self.row_B)
        return (
            self.keys_SHTC[:rows, :, : self.num_visible],
            self.values_SHTC[:rows, :, : self.num_visible],
        )

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        """Copy slots `source_M` to slots `target_M`; no slot is in both."""
        assert self.keys_SHTC is not None and self.values_SHTC is not None
        for states_SHTC in (self.keys_SHTC, self.values_SHTC):
            used = states_SHTC[:, :, : self.num_visible]
            used[target_M] = used[source_M]

    def get_seq_length(self) -> int:
        """Longest row so far; models use it only where no position ids are given."""
        return self.num_visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset; unused, because the sampler passes the mask itself."""
        return self.num_visible + query_length, 0


class SlotCache(Cache):
    """One `SlotLayer` per layer, and the bookkeeping that they share."""

    def __init__(self, num_layers: int, num_slots: int, num_positions: int) -> None:
        super().__init__(layers=[SlotLayer(num_slots, num_positions) for _ in range(num_layers)])

    def aim(self, length_B: Tensor) -> Tensor:
        """Point at the next position of every row; returns the attention mask [B, 1, 1, T].

        `length_B` counts the tokens stored so far; the token of this step goes to that index.
        """
        num_visible = int(length_B.max()) + 1
        row_B = torch.arange(len(length_B), device=length_B.device)
        for layer in self.layers:
            layer.row_B, layer.length_B, layer.num_visible = row_B, length_B, num_visible
        mask_BT = torch.arange(num_visible, device=length_B.device) <= length_B[:, None]
        return mask_BT[:, None, None, :]

    def fill(self, slot_B: Tensor, prefilled: DynamicCache, row_B: Tensor) -> None:
        """Copy prefilled prompts (row `row_B` of the prefill) into slots `slot_B`."""
        for mine, theirs in zip(self.layers, prefilled.layers, strict=True):
            mine.fill(slot_B, theirs.keys[row_B], theirs.values[row_B])

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        """Copy slots `source_M` to slots `target_M`."""
        for layer in self.layers:
            layer.move(source_M, target_M)
