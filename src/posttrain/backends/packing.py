"""Rows into forward passes: a group's prompt once, no padding to speak of, any causal transformer.

Rows that stand next to each other with the same prompt become one unit: the prompt, then each
response after it. Units are laid into bins. Position ids say where in its own row a token stands,
and a mask lets a response see its prompt and itself and nothing else, so the numbers are those of
one row at a time. Sharing the prompt is what a group of samples gains most from; filling the bins
is what rows of mixed lengths gain most from.

Legend: B rows, G segments (a prompt or a response), C bins, T positions of a bin or of a row,
N flat response tokens, M all tokens that are read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from posttrain.rl.types import Rollouts

MIN_WIDTH = 96
"""Bins are at least about this wide, so that short rows have others to share with."""
MAX_SHARED_WIDTH = 1024
"""Nothing joins others beyond this width, or beyond four times the hidden size."""
WORTH_TWO = 1024
"""Tokens that are worth two passes."""
STRETCH = (1.0, 1.5, 2.0)
NARROWER = (0.6, 0.8, 0.9, 1.0)
"""Ways to lay out a batch that are tried: how much wider than its longest unit a bin may be, and
below which share of that width the next unit has to wait for a pass with narrower bins."""


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Rows that lie behind one another: those with one prompt share it."""

    rows: tuple[int, ...]
    width: int


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The rows of one forward pass and where each of their tokens is."""

    index_B: Tensor
    """int64, which rows of the batch, ascending."""
    tokens_CT: Tensor
    position_CT: Tensor
    """int64, the position of each token within its own row; 0 where unused."""
    predicts_N: Tensor
    """int64, for each response token, row after row, the position that predicts it when the bins
    are laid end to end."""
    at_M: Tensor
    """int64, ascending, where the tokens stand when the bins are laid end to end."""
    unit_CT: Tensor
    """int64, which unit a position belongs to; -1 where unused."""
    owner_CT: Tensor
    """int64, the row that a response token belongs to; -1 in prompts, -2 where unused."""
    shared: bool
    """Whether some bin holds more than one row."""

    def to(self, device: torch.device) -> Packed:
        """The same pass on another device; this one itself where it is on it."""
        return replace(
            self,
            index_B=self.index_B.to(device),
            tokens_CT=self.tokens_CT.to(device),
            position_CT=self.position_CT.to(device),
            predicts_N=self.predicts_N.to(device),
            at_M=self.at_M.to(device),
            unit_CT=self.unit_CT.to(device),
            owner_CT=self.owner_CT.to(device),
        )

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """`[C, 1, T, T]`, 0 where a position may look and -inf elsewhere; None for causal."""
        if not self.shared:
            return None
        unit_CT, owner_CT = self.unit_CT, self.owner_CT
        width = unit_CT.shape[1]
        visible_CTT = unit_CT[:, :, None] == unit_CT[:, None, :]
        visible_CTT &= (owner_CT[:, :, None] == owner_CT[:, None, :]) | (owner_CT == -1)[:, None, :]
        visible_CTT &= torch.ones(width, width, dtype=torch.bool, device=unit_CT.device).tril()
        mask_CTT = torch.zeros(visible_CTT.shape, dtype=dtype, device=unit_CT.device)
        return mask_CTT.masked_fill_(~visible_CTT, -torch.inf)[:, None]


def forward_passes(
    rollouts: Rollouts, *, max_tokens: int, hidden_size: int, block: int = 1, pack: bool = True
) -> Iterator[Packed]:
    """All rows in passes of at most `max_tokens` positions, except where one unit is longer.

    Wide bins are filled better and narrow ones spend less on attention over what the mask forbids;
    the model's `hidden_size` says how much the latter weighs. Rows come in blocks of `block` that
    share a prompt and stay in one pass: 2 for the two sides of a preference. Without `pack` every
    row has a bin of its own, for models whose layers look further than a mask can forbid.
    """
    lengths = _Lengths(rollouts)
    if pack:
        limit = _shared_width(hidden_size)
        units, costs = lengths.units(block, limit), _Costs.bins(hidden_size)
        layout = _cheapest_bins(units, limit, max_tokens=max_tokens, costs=costs)
    else:
        layout = _one_row_per_bin(lengths.blocks(block), max_tokens=max_tokens)
    for bins, width in layout:
        yield lengths.lay_out(bins, width)


def flat_passes(
    rollouts: Rollouts, *, max_tokens: int, hidden_size: int, block: int = 1
) -> Iterator[tuple[Packed, ...]]:
    """The same for models of which only attention sees bins (`flat.py`): a pass has several widths.

    Passes have like numbers of tokens, `max_tokens` and a bin at most. A batch worth it makes two
    at least, whether or not there is a second core for one, so that the sums are the same on every
    machine.
    """
    lengths = _Lengths(rollouts)
    limit = _shared_width(hidden_size)
    units = lengths.units(block, limit)
    total = sum(unit.width for unit in units)
    count = max(-(-total // max_tokens), 2 if total >= WORTH_TWO else 1)
    layout = _cheapest_bins(units, limit, max_tokens=max_tokens, costs=_Costs.flat(hidden_size))
    read = 0
    passes: list[list[tuple[list[_Unit], int]]] = [[] for _ in range(count)]
    for bins, width in layout:
        for one in bins:
            # A bin belongs where its middle lies.
            size = sum(unit.width for unit in one)
            passes[(2 * read + size) * count // (2 * total)].append((one, width))
            read += size
    for chosen in filter(None, passes):
        yield tuple(
            lengths.lay_out([one for one, _ in same], width)
            for width, same in groupby(chosen, key=lambda one: one[1])
        )


def _shared_width(hidden_size: int) -> int:
    """The width beyond which nothing joins others."""
    return min(MAX_SHARED_WIDTH, max(MIN_WIDTH, 4 * hidden_size))


class _Lengths:
    """What packing needs to know of a batch, as Python numbers."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.tokens_BT = rollouts.tokens_BT
        self.prompt: list[int] = rollouts.prompt_len_B.tolist()
        self.response: list[int] = rollouts.response_len_B.tolist()
        self.same_prompt = _same_prompt_as_before(rollouts)

    def read(self, row: int) -> int:
        """Response tokens of a row that are read: the last one predicts nothing that is wanted."""
        return max(0, self.response[row] - 1)

    def units(self, block: int, limit: int) -> list[_Unit]:
        """Neighbours with one prompt, as many as fit a width of `limit`; blocks stay whole."""
        units: list[_Unit] = []
        rows: list[int] = []
        width = 0
        for first in range(0, len(self.prompt), block):
            fresh = range(first, first + block)
            added = sum(map(self.read, fresh))
            added += sum(self.prompt[row] for row in fresh if not self.same_prompt[row])
            if rows and not (self.same_prompt[first] and width + added <= limit):
                units.append(_Unit(rows=tuple(rows), width=width))
                rows, width = [], 0
            if not rows and self.same_prompt[first]:
                width = self.prompt[first]
            width += added
            rows += fresh
        return [*units, _Unit(rows=tuple(rows), width=width)]

    def blocks(self, block: int) -> list[list[_Unit]]:
        """Every block of rows, each row a unit of its own."""
        units = [
            _Unit(rows=(row,), width=prompt + self.read(row))
            for row, prompt in enumerate(self.prompt)
        ]
        return [units[first : first + block] for first in range(0, len(units), block)]

    def lay_out(self, bins: Sequence[Sequence[_Unit]], width: int) -> Packed:
        """The tensors of one forward pass: one bin after the other, one unit after the other."""
        segments: list[tuple[int, int, int, int, int, int]] = []
        placed: dict[int, tuple[int, int]] = {}
        number = 0
        for at, units in zip(range(0, len(bins) * width, width), bins, strict=True):
            for unit in units:
                for row in unit.rows:
                    prompt = self.prompt[row]
                    if row == unit.rows[0] or not self.same_prompt[row]:
                        number += 1
                        segments.append((row, 0, at, prompt, number, -1))
                        last, at = at + prompt - 1, at + prompt
                    segments.append((row, prompt, at, self.read(row), number, row))
                    placed[row] = (last, at)
                    at += self.read(row)
        return self._tensors(segments, placed, len(bins), width)

    def _tensors(
        self,
        segments: list[tuple[int, int, int, int, int, int]],
        placed: dict[int, tuple[int, int]],
        num_bins: int,
        width: int,
    ) -> Packed:
        device = self.tokens_BT.device
        table_G = torch.tensor(segments, device=device).T
        row_G, column_G, at_G, length_G, unit_G, owner_G = table_G
        segment_M = torch.arange(len(segments), device=device).repeat_interleave(length_G)
        offset_M = torch.arange(len(segment_M), device=device)
        offset_M -= (length_G.cumsum(0) - length_G)[segment_M]
        at_M, column_M = at_G[segment_M] + offset_M, column_G[segment_M] + offset_M
        blank = torch.zeros(4, num_bins * width, dtype=torch.int64, device=device)
        blank[2], blank[3] = -1, -2
        tokens_M, position_M, unit_M, owner_M = blank
        tokens_M[at_M] = self.tokens_BT[row_G[segment_M], column_M]
        position_M[at_M] = column_M
        unit_M[at_M], owner_M[at_M] = unit_G[segment_M], owner_G[segment_M]
        rows = sorted(placed)
        response_B = torch.tensor([self.response[row] for row in rows], device=device)
        last_B, start_B = torch.tensor([placed[row] for row in rows], device=device).T
        row_N = torch.arange(len(rows), device=device).repeat_interleave(response_B)
        offset_N = torch.arange(len(row_N), device=device)
        offset_N -= (response_B.cumsum(0) - response_B)[row_N]
        shape = (num_bins, width)
        return Packed(
            index_B=torch.tensor(rows, device=device),
            tokens_CT=tokens_M.view(shape),
            position_CT=position_M.view(shape),
            # The prompt's last token predicts the first of a response, and so on from there.
            predicts_N=torch.where(offset_N == 0, last_B[row_N], start_B[row_N] + offset_N - 1),
            at_M=at_M,
            unit_CT=unit_M.view(shape),
            owner_CT=owner_M.view(shape),
            shared=len(rows) > num_bins,
        )


def _same_prompt_as_before(rollouts: Rollouts) -> list[bool]:
    """For each row whether its prompt is that of the row before it."""
    if len(rollouts) < 2:
        return [False] * len(rollouts)
    length_B = rollouts.prompt_len_B
    columns = int(length_B.max())
    tokens_BT = rollouts.tokens_BT[:, :columns]
    beyond_BT = torch.arange(columns, device=length_B.device) >= length_B[:, None]
    equal_BT = (tokens_BT[1:] == tokens_BT[:-1]) | beyond_BT[1:]
    same_B = equal_BT.all(dim=1) & (length_B[1:] == length_B[:-1])
    return [False, *same_B.tolist()]


_Passes = list[tuple[list[list[_Unit]], int]]
"""The bins of each forward pass, and their width."""


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """What a layout costs, in positions times width of attention."""

    start: float
    """Of one more width."""
    position: float
    """Of a position in the linear layers, 24 D^2 operations against 4 W D in attention, which
    reaches about half of their speed."""

    @classmethod
    def bins(cls, hidden_size: int) -> _Costs:
        """Every width is a forward and backward pass, which takes as long as some 50 positions:
        small products are slow, and every pass adds to the gradients of all weights."""
        return cls(start=50.0 * 3 * hidden_size, position=3.0 * hidden_size)

    @classmethod
    def flat(cls, hidden_size: int) -> _Costs:
        """A width is a few more operations in every layer, and padding costs attention alone."""
        return cls(start=20.0 * 3 * hidden_size, position=0.0)

    def of(self, passes: _Passes) -> float:
        """Of all positions of these passes."""
        return sum(self.start + len(b) * width * (self.position + width) for b, width in passes)


def _cheapest_bins(units: list[_Unit], limit: int, *, max_tokens: int, costs: _Costs) -> _Passes:
    """The layout of all units that costs least, of the few that are tried."""
    units = sorted(units, key=lambda unit: (unit.width, -unit.rows[0]))
    layouts = (
        _fill_bins(units, limit, max_tokens=max_tokens, stretch=stretch, narrower=narrower)
        for stretch in STRETCH
        for narrower in NARROWER
    )
    return min(layouts, key=costs.of)


def _fill_bins(
    units: list[_Unit], limit: int, *, max_tokens: int, stretch: float, narrower: float
) -> _Passes:
    """Bins of one width for every pass, widest first; each bin takes the longest units that fit.

    `units` come by rising width; those of one width keep their order, which makes the result a
    function of the batch.
    """
    left = list(units)
    widths = [unit.width for unit in left]
    passes: _Passes = []
    while left:
        longest = widths[-1]
        # A multiple of the longest, so that units of one length fill the bin.
        width = max(longest, int(longest * stretch), longest * -(-MIN_WIDTH // longest))
        width = max(longest, min(limit, max_tokens, width))
        bins: list[list[_Unit]] = []
        while left and (not bins or (len(bins) + 1) * width <= max_tokens):
            if bins and widths[-1] < narrower * longest:
                break
            chosen: list[_Unit] = []
            room = width
            # A unit beyond the limit stays alone in its bin.
            while (found := bisect_right(widths, room)) and not (chosen and longest > limit):
                chosen.append(left.pop(found - 1))
                room -= widths.pop(found - 1)
            bins.append(chosen)
        passes.append((bins, width))
    return passes


def _one_row_per_bin(blocks: list[list[_Unit]], *, max_tokens: int) -> _Passes:
    """The same without sharing: blocks of like length together, longest first."""

    def longest(block: list[_Unit]) -> int:
        return max(unit.width for unit in block)

    passes: _Passes = []
    bins: list[list[_Unit]] = []
    width = 0
    for block in sorted(blocks, key=longest, reverse=True):
        if not bins or (len(bins) + len(block)) * width > max_tokens:
            bins, width = [], longest(block)
            passes.append((bins, width))
        bins += [[unit] for unit in block]
    return passes
