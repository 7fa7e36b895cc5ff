"""Rows into forward passes: a group's prompt once, no padding to speak of, full attention only.

Rows that stand next to each other with the same prompt become one unit: the prompt, then what
follows it in each row, up to the last sampled token. Units are laid into bins. Position ids say
where in its own row a token stands, and a mask lets a row see its prompt and itself and nothing
else, so the numbers are those of one row at a time. Sharing the prompt is what a group of samples
gains most from; filling the bins is what rows of mixed lengths gain most from.

    unit    prompt p, rows a and b after it     p p p a a a b b
    bin     units until the width is full       p p p a a a b b q q c c . .
    pass    bins of one width                   tokens_CT, C bins of T positions

Legend: B rows, G segments (a prompt, or what follows it in one row), C bins, T positions of a bin
or of a row, S positions of all bins laid end to end, M tokens that are read, N sampled tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.backends.architecture import backbone
from posttrain.backends.padded import read_lengths
from posttrain.backends.recompute import recomputing
from posttrain.rl.batch import Batch

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
class PackedPass:
    """A `ForwardPass` over bins of one width: its rows, and where each of their tokens is."""

    index_B: Tensor
    """int64, which rows of the batch, ascending."""
    tokens_CT: Tensor
    """int64, 0 where unused."""
    position_CT: Tensor
    """int64, the position of each token within its own row; 0 where unused."""
    predicts_N: Tensor
    """int64, for each sampled token, row after row, which of the S positions predicts it."""
    index_M: Tensor
    """int64, ascending, which of the S positions hold a token."""
    unit_CT: Tensor
    """int64, which unit a position belongs to; -1 where unused."""
    owner_CT: Tensor
    """int64, the row that a token after a prompt belongs to; -1 in prompts, -2 where unused."""
    shared: bool
    """Whether some bin holds more than one row."""

    @property
    def num_positions(self) -> int:
        """See `ForwardPass.num_positions`."""
        return self.tokens_CT.numel()

    def hidden_states(self, model: Any, body: Any = None, *, checkpointing: bool = False) -> Tensor:
        """See `ForwardPass.hidden_states`."""
        bins = self.to(model.device)
        body = backbone(model) if body is None else body
        with recomputing(model, checkpointing):
            hidden_CTD: Tensor = body(
                input_ids=bins.tokens_CT,
                use_cache=False,
                position_ids=bins.position_CT,
                attention_mask=bins.mask(model.dtype),
            ).last_hidden_state
        # [C, T, D] -> [S, D] -> [N, D].
        return hidden_CTD.flatten(0, 1)[bins.predicts_N]

    def to(self, device: torch.device) -> PackedPass:
        """The same pass on another device; this one itself where it is on it."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """`[C, 1, T, T]`, 0 where a position may look and -inf elsewhere; None for causal."""
        if not self.shared:
            return None
        unit_CT, owner_CT = self.unit_CT, self.owner_CT
        width = unit_CT.shape[1]
        # [C, T] -> [C, T, T], queries along the first T and keys along the second. Unused positions
        # see one another, so that no softmax is over nothing.
        visible_CTT = unit_CT[:, :, None] == unit_CT[:, None, :]
        visible_CTT &= (owner_CT[:, :, None] == owner_CT[:, None, :]) | (owner_CT == -1)[:, None, :]
        visible_CTT &= torch.ones(width, width, dtype=torch.bool, device=unit_CT.device).tril()
        mask_CTT = torch.zeros(visible_CTT.shape, dtype=dtype, device=unit_CT.device)
        return mask_CTT.masked_fill_(~visible_CTT, -torch.inf)[:, None]


def packed_passes(
    batch: Batch, *, max_tokens: int, hidden_size: int, group_rows: int = 1
) -> Iterator[PackedPass]:
    """All rows in passes of at most `max_tokens` positions, except where one unit is longer.

    Wide bins are filled better and narrow ones spend less on attention over what the mask forbids;
    the model's `hidden_size` says how much the latter weighs. Rows come in blocks of `group_rows`
    that stay in one pass: 2 for the two sides of a preference.
    """
    rows = _Rows(batch)
    limit = _shared_width(hidden_size)
    units, costs = rows.units(group_rows, limit), _Costs.bins(hidden_size)
    for bins, width in _cheapest_bins(units, limit, max_tokens=max_tokens, costs=costs):
        yield rows.lay_out(bins, width)


def flat_passes(
    batch: Batch, *, max_tokens: int, hidden_size: int, group_rows: int = 1
) -> Iterator[tuple[PackedPass, ...]]:
    """The same for models of which only attention sees bins (`flat.py`): a pass has several widths.

    Passes have like numbers of tokens, `max_tokens` and a bin at most. A batch worth it makes two
    at least, whether or not there is a second core for one, so that the sums are the same on every
    machine.
    """
    rows = _Rows(batch)
    limit = _shared_width(hidden_size)
    units = rows.units(group_rows, limit)
    total = sum(unit.width for unit in units)
    count = max(-(-total // max_tokens), 2 if total >= WORTH_TWO else 1)
    layout = _cheapest_bins(units, limit, max_tokens=max_tokens, costs=_Costs.flat(hidden_size))
    before = 0
    passes: list[list[tuple[list[_Unit], int]]] = [[] for _ in range(count)]
    for bins, width in layout:
        for one in bins:
            # A bin belongs where its middle lies.
            size = sum(unit.width for unit in one)
            passes[(2 * before + size) * count // (2 * total)].append((one, width))
            before += size
    # A bin can be longer than the share of a pass; another pass may then have none.
    for chosen in filter(None, passes):
        yield tuple(
            rows.lay_out([one for one, _ in same], width)
            for width, same in groupby(chosen, key=lambda one: one[1])
        )


def _shared_width(hidden_size: int) -> int:
    """The width beyond which nothing joins others."""
    return min(MAX_SHARED_WIDTH, max(MIN_WIDTH, 4 * hidden_size))


class _Segment(NamedTuple):
    """Tokens that stand together, in their row and in their bin."""

    row: int
    column: int
    """Of the first token in its row."""
    start: int
    """Of the first token among the S positions."""
    length: int
    unit: int
    owner: int
    """See `PackedPass.owner_CT`."""


class _Rows:
    """What packing needs to know of a batch, as Python numbers."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.prompt_len: list[int] = batch.prompt_len_B.tolist()
        # Tokens after the prompt that are read.
        self.read_len: list[int] = (read_lengths(batch) - batch.prompt_len_B).tolist()
        self.same_prompt = _same_prompt_as_before(batch)

    def units(self, block: int, limit: int) -> list[_Unit]:
        """Neighbours with one prompt, as many as fit a width of `limit`; blocks stay whole."""
        units: list[_Unit] = []
        rows: list[int] = []
        width = 0
        for first in range(0, len(self.prompt_len), block):
            fresh = range(first, first + block)
            added = sum(self.read_len[row] for row in fresh)
            added += sum(self.prompt_len[row] for row in fresh if not self.same_prompt[row])
            if rows and not (self.same_prompt[first] and width + added <= limit):
                units.append(_Unit(rows=tuple(rows), width=width))
                rows, width = [], 0
            if not rows and self.same_prompt[first]:
                # A unit that was full: the next one reads the prompt again.
                width = self.prompt_len[first]
            width += added
            rows += fresh
        return [*units, _Unit(rows=tuple(rows), width=width)]

    def lay_out(self, bins: Sequence[Sequence[_Unit]], width: int) -> PackedPass:
        """The tensors of one forward pass: one bin after the other, one unit after the other."""
        segments: list[_Segment] = []
        # Row -> the last position of its prompt and the first after it, among the S positions.
        places: dict[int, tuple[int, int]] = {}
        number = 0
        for start, units in zip(range(0, len(bins) * width, width), bins, strict=True):
            for unit in units:
                for row in unit.rows:
                    prompt_len = self.prompt_len[row]
                    # A block may bring several prompts; each begins a unit of its own in the mask.
                    if row == unit.rows[0] or not self.same_prompt[row]:
                        number += 1
                        segments.append(_Segment(row, 0, start, prompt_len, number, -1))
                        prompt_end, start = start + prompt_len - 1, start + prompt_len
                    read_len = self.read_len[row]
                    segments.append(_Segment(row, prompt_len, start, read_len, number, row))
                    places[row] = (prompt_end, start)
                    start += read_len
        return self._tensors(segments, places, len(bins), width)

    def _tensors(
        self,
        segments: list[_Segment],
        places: dict[int, tuple[int, int]],
        num_bins: int,
        width: int,
    ) -> PackedPass:
        device = self.batch.device
        # [G, 6] -> six tensors [G], the fields of `_Segment` in their order.
        row_G, column_G, start_G, length_G, unit_G, owner_G = torch.tensor(
            segments, device=device
        ).T
        # Of every token that is read: its segment, and how far from the segment's first it is.
        segment_M = torch.arange(len(segments), device=device).repeat_interleave(length_G)
        offset_M = torch.arange(len(segment_M), device=device)
        offset_M -= (length_G.cumsum(0) - length_G)[segment_M]
        index_M, column_M = start_G[segment_M] + offset_M, column_G[segment_M] + offset_M
        # Four rows of S positions, filled with what stands where no token is.
        blank = torch.zeros(4, num_bins * width, dtype=torch.int64, device=device)
        blank[2], blank[3] = -1, -2
        tokens_S, position_S, unit_S, owner_S = blank
        tokens_S[index_M] = self.batch.tokens_BT[row_G[segment_M], column_M]
        position_S[index_M] = column_M
        unit_S[index_M], owner_S[index_M] = unit_G[segment_M], owner_G[segment_M]
        index_B = torch.tensor(sorted(places), device=device)
        prompt_end_B, start_B = torch.tensor(
            [places[row] for row in sorted(places)], device=device
        ).T
        # [N, 2]: row after row, and from left to right within a row.
        row_N, column_N = self.batch.sampled_BT[index_B].nonzero().T
        # Counted from the end of the prompt.
        offset_N = column_N - self.batch.prompt_len_B[index_B][row_N]
        shape = (num_bins, width)
        return PackedPass(
            index_B=index_B,
            tokens_CT=tokens_S.view(shape),
            position_CT=position_S.view(shape),
            # The prompt's last token predicts the first after it, and so on from there.
            predicts_N=torch.where(
                offset_N == 0, prompt_end_B[row_N], start_B[row_N] + offset_N - 1
            ),
            index_M=index_M,
            unit_CT=unit_S.view(shape),
            owner_CT=owner_S.view(shape),
            shared=len(places) > num_bins,
        )


def _same_prompt_as_before(batch: Batch) -> list[bool]:
    """For each row whether its prompt is that of the row before it."""
    if len(batch) < 2:
        return [False] * len(batch)
    length_B = batch.prompt_len_B
    columns = int(length_B.max())
    tokens_BT = batch.tokens_BT[:, :columns]
    beyond_BT = torch.arange(columns, device=length_B.device) >= length_B[:, None]
    # What follows the prompts does not count; that they are of one length is asked below.
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
    # Bins take from the end, so of units of one width the earliest rows go first.
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
