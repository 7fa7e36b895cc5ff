"""The keys and values of all rows that are being sampled, as long as the longest of them is.

Most responses end long before they must, so room for all that a row could ever have would lie idle,
or not be there at all. The cache begins with what costs little and doubles whenever a row needs a
further position. How many positions it has changes no number.

Legend: S slots, H key-value heads, T positions, C head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUND = 16
"""Positions come in multiples of it: products find the same alignment whatever their number."""
AT_ONCE = 2**26
"""Bytes that are taken at once. A cache that needs no more never grows."""


class Cache:
    """Room for so many rows, in `tensor`: [layers, 2, S, H, T, C]."""

    def __init__(self, shape: tuple[int, int, int, int, int, int], like: Tensor) -> None:
        """Room for the whole `shape` where that is little; else for the first positions of it.
        Type and device are those of `like`."""
        self.shape = shape
        layers, _, slots, keys, positions, width = shape
        per_position = 2 * layers * slots * keys * width * like.element_size()
        while positions > ROUND and positions * per_position > AT_ONCE:
            # Halves of the whole, so that doubling ends exactly there.
            positions = _rounded(-(-positions // 2))
        self.tensor = like.new_zeros((layers, 2, slots, keys, positions, width))
        """Never anything but finite numbers, for what no row has written yet is multiplied by
        zero."""

    @property
    def positions(self) -> int:
        """How many there are now."""
        return int(self.tensor.shape[4])

    def take_over(self, shape: tuple[int, int, int, int, int, int]) -> bool:
        """Whether it serves for another shape, which it may then grow to: getting fresh memory from
        the system takes longer than filling it."""
        needed = (*shape[:4], min(shape[4], self.positions), shape[5])
        # What another cache of that shape would be at once, this one is to be as well.
        size = torch.Size(shape).numel() * self.tensor.element_size()
        if size <= AT_ONCE:
            needed = shape
        if any(have < want for have, want in zip(self.tensor.shape, needed, strict=True)):
            return False
        self.shape = shape
        return True

    def reach(self, positions: int) -> bool:
        """Have so many positions at least; returns whether it has grown."""
        if positions <= self.positions:
            return False
        old, size = self.tensor, list(self.tensor.shape)
        size[4] = max(_rounded(positions), min(2 * self.positions, self.shape[4]))
        self.tensor = old.new_zeros(size)
        self.tensor[:, :, :, :, : old.shape[4]] = old
        return True


def _rounded(positions: int) -> int:
    return -(-positions // ROUND) * ROUND
