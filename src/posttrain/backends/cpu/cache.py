"""The keys and values of all rows that are being sampled, as long as the longest of them is.

Most responses end long before they must, so room for all that a row could ever have would lie idle,
or not be there at all. The cache begins with what costs little and doubles whenever a row needs a
further position. How many positions it has changes no number.

A cache that follows closely has no more positions than rows need, but for a few, and lies without
gaps in memory that is larger: its batched products need copy nothing. Every `STEP` positions it is
laid out anew, which takes a few hundredths of the time that the products save.

Legend: S slots, H key-value heads, T positions, C head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUND = 16
"""Positions come in multiples of it: products find the same alignment whatever their number."""
STEP = 32
"""The same where the cache follows closely: fewer would be laid out anew more often, more would be
read in vain."""
AT_ONCE = 2**26
"""Bytes that are taken at once. A cache that needs no more never grows."""

Shape = tuple[int, int, int, int, int, int]


class Cache:
    """Room for so many rows, in `tensor`: [layers, 2, S, H, T, C]."""

    def __init__(self, shape: Shape, like: Tensor, *, closely: bool = False) -> None:
        """Room for the whole `shape` where that is little; else for the first positions of it.
        Type and device are those of `like`; `closely` see above."""
        self.shape, self.closely = shape, closely
        self.slots = shape[2]
        per_position = self._count(1) * like.element_size()
        positions = shape[4]
        while positions > ROUND and positions * per_position > AT_ONCE:
            # Halves of the whole, so that doubling ends exactly there.
            positions = _rounded(-(-positions // 2), ROUND)
        if closely:
            positions = _rounded(positions, STEP)
        # Never anything but finite numbers, for what no row has written yet is multiplied by zero.
        self.memory = like.new_zeros(self._count(positions))
        self.tensor = self._lay(STEP if closely else positions)

    @property
    def positions(self) -> int:
        """How many there are now."""
        return int(self.tensor.shape[4])

    def take_over(self, shape: Shape) -> bool:
        """Whether it serves for another shape, which it may then grow to: getting fresh memory from
        the system takes longer than filling it."""
        if self.closely:
            serves = (*shape[:2], shape[3], shape[5]) == (*self.shape[:2], *self.shape[3:6:2])
            if serves:
                self.shape, self.slots = shape, shape[2]
                serves = self._count(STEP) <= len(self.memory)
            if serves:
                self.tensor = self._lay(STEP)
            return serves
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
        have = self.positions
        if positions <= have:
            return False
        old, doubled = self.tensor, min(2 * have, self.shape[4])
        size = _rounded(positions, STEP if self.closely else ROUND)
        if not self.closely:
            size = max(size, doubled)
        room = self._count(size)
        moves = room <= len(self.memory)
        if not moves:
            self.memory = old.new_zeros(max(room, self._count(doubled)))
        self.tensor = self._lay(size)
        # From the last layer to the first: each one goes to where only later ones were.
        for layer in reversed(range(len(old))):
            new_2SHTC, kept_2SHTC = self.tensor[layer], old[layer]
            new_2SHTC[:, :, :, :have] = kept_2SHTC.clone() if moves else kept_2SHTC
            if moves:
                new_2SHTC[:, :, :, have:] = 0
        return True

    def _count(self, positions: int) -> int:
        """Numbers in so many positions of all slots."""
        layers, both, _, keys, _, width = self.shape
        return layers * both * self.slots * keys * positions * width

    def _lay(self, positions: int) -> Tensor:
        """The beginning of the memory as so many positions."""
        layers, both, _, keys, _, width = self.shape
        flat = self.memory[: self._count(positions)]
        return flat.view(layers, both, self.slots, keys, positions, width)


def _rounded(positions: int, step: int) -> int:
    return -(-positions // step) * step
