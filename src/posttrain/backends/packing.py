"""Several short rows in one: padding-free batches that any causal transformers model accepts.

Rows are put into bins of equal width; position ids restart with every row and a block mask keeps
the rows of a bin apart. Prompts and responses differ in length, and on short ones padding to the
longest row would be half of all that is computed.

Legend: B rows, C bins, T positions of a bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_WIDTH = 96
"""Bins are at least this wide, so that short rows have others to share with."""
MAX_SHARED_WIDTH = 512
"""Wider rows get a bin of their own: a block mask costs width squared."""


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Where every position of every bin comes from."""

    row_CT: Tensor
    """int64, the row that a position belongs to; -1 in unused positions."""
    position_CT: Tensor
    """int64, the position within that row; 0 in unused positions."""
    start_B: Tensor
    """int64, where each row begins when bins are laid end to end."""
    shared: bool
    """Whether some bin holds more than one row."""

    def mask(self) -> Tensor | None:
        """bool `[C, 1, T, T]`, True where attention is allowed; None where causal is enough."""
        if not self.shared:
            return None
        same_CTT = self.row_CT[:, :, None] == self.row_CT[:, None, :]
        width = self.row_CT.shape[1]
        causal_TT = torch.ones(width, width, dtype=torch.bool).tril()
        return (same_CTT & causal_TT)[:, None]


def pack(length_B: Tensor) -> Bins:
    """Bins for rows of these lengths (each at least 1), filled first-fit, longest rows first."""
    lengths = length_B.tolist()
    longest = max(lengths)
    if longest > MAX_SHARED_WIDTH or len(lengths) == 1:
        return _one_row_per_bin(length_B, longest)
    width = max(longest, MIN_WIDTH)
    room: list[int] = []
    place = [(0, 0)] * len(lengths)
    # Bins with too little room for the shortest row are not looked at again.
    first_open, shortest = 0, min(lengths)
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[row]
        while first_open < len(room) and room[first_open] < shortest:
            first_open += 1
        chosen = next((b for b in range(first_open, len(room)) if room[b] >= length), len(room))
        if chosen == len(room):
            room.append(width)
        place[row] = (chosen, width - room[chosen])
        room[chosen] -= length
    start_B = torch.tensor([number * width + offset for number, offset in place])
    return _fill(length_B, start_B, len(room), width, shared=len(room) < len(lengths))


def _one_row_per_bin(length_B: Tensor, width: int) -> Bins:
    start_B = torch.arange(len(length_B)) * width
    return _fill(length_B, start_B, len(length_B), width, shared=False)


def _fill(length_B: Tensor, start_B: Tensor, count: int, width: int, *, shared: bool) -> Bins:
    row_N = torch.arange(len(length_B)).repeat_interleave(length_B)
    before_B = length_B.cumsum(0) - length_B
    position_N = torch.arange(int(length_B.sum())) - before_B[row_N]
    at_N = start_B[row_N] + position_N
    row_M = torch.full((count * width,), -1)
    position_M = torch.zeros(count * width, dtype=torch.int64)
    row_M[at_N], position_M[at_N] = row_N, position_N
    return Bins(
        row_CT=row_M.reshape(count, width),
        position_CT=position_M.reshape(count, width),
        start_B=start_B,
        shared=shared,
    )
