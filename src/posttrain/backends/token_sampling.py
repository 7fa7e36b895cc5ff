"""What all samplers share: how a token is drawn, and where what was drawn is kept.

A token is drawn by inverse transform from one uniform number that depends only on (seed, row,
position), so that a row's response depends neither on the rows beside it nor on the sampler.

With top-p sampling the policy that samples is not the policy over the whole vocabulary. So the
batch says which ids each token was drawn from, its nucleus, and a learner takes the softmax over
these (Keep Sampling Mask: DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

Legend: P prompts, B rows, L rows that are running, E rows that have just ended, T positions,
R response positions, N sampled tokens of all rows, F ids of their nuclei, V vocabulary, K blocks of
W tokens of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch, pad_rows, ragged_index

FIRST_COLUMNS = 256
"""Tokens of a response that there is room for from the beginning."""
BLOCK = 256
"""Tokens of the vocabulary whose probabilities are added up before any is looked at."""


class Drawn(NamedTuple):
    """One token of each row."""

    token_B: Tensor
    logp_B: Tensor
    """Under the distribution that it was drawn from."""
    nucleus_BV: Tensor | None
    """bool, the ids that it was drawn from; None for all."""


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float = 1.0) -> Drawn:
    """One token per row: inverse transform, or the arg max at temperature 0.

    Draws the first token whose cumulative probability passes the row's uniform number; with `top_p`
    below 1 of the row's nucleus alone. Logits of any type; what is computed from them is float32
    and float64.
    """
    in_blocks = logits_BV.dtype == torch.bfloat16 and logits_BV.device.type == "cpu"
    logits_BV = logits_BV.float()
    if in_blocks and top_p >= 1 and temperature > 0:
        return _draw_in_blocks(
            logits_BV / temperature if temperature != 1 else logits_BV, uniform_B
        )
    nucleus_BV = None
    if top_p < 1:
        nucleus_BV = nucleus(logits_BV / temperature, top_p)
        logits_BV = logits_BV.masked_fill(~nucleus_BV, -torch.inf)
    if temperature == 0:
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        token_B = logits_BV.argmax(dim=-1)
    else:
        if temperature != 1:
            logits_BV = logits_BV / temperature
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        cumulative_BV = cumulative(logp_BV.double().exp_())
        # The number is scaled to the sum of the row, which need not be 1. Sums may be integers.
        target_B1 = (uniform_B[:, None] * cumulative_BV[:, -1:]).to(cumulative_BV.dtype)
        # right=True finds the first sum above the target: a token of probability 0 is never drawn.
        token_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
        # The product above can round up to the whole sum.
        token_B = token_B.clamp_(max=logits_BV.shape[1] - 1)
    return Drawn(token_B, logp_BV.gather(1, token_B[:, None])[:, 0], nucleus_BV)


def _draw_in_blocks(logits_BV: Tensor, uniform_B: Tensor) -> Drawn:
    """`draw` for logits that had been rounded to 8 bits: first a block of the vocabulary, then a
    token of it, so that only small sums are float64. A fifth of the time, for 49,152 tokens."""
    probability_BV = torch.softmax(logits_BV, dim=-1)
    # [B, V] -> [B, K, W]: K blocks of W tokens.
    missing = -probability_BV.shape[1] % BLOCK
    block_BKW = pad(probability_BV, (0, missing)) if missing else probability_BV
    block_BKW = block_BKW.unflatten(1, (-1, BLOCK))
    sum_BK = block_BKW.sum(-1).double()
    block_B1, share_B1 = _first_above(sum_BK, uniform_B[:, None])
    row_B = torch.arange(len(block_B1), device=block_B1.device)
    within_B1, _ = _first_above(block_BKW[row_B, block_B1[:, 0]].double(), share_B1)
    token_B1 = (block_B1 * BLOCK + within_B1).clamp_(max=probability_BV.shape[1] - 1)
    logp_B = probability_BV.gather(1, token_B1)[:, 0].log()
    return Drawn(token_B1[:, 0], logp_B, None)


def _first_above(weight_BK: Tensor, share_B1: Tensor) -> tuple[Tensor, Tensor]:
    """`index_B1`, where the cumulative weight first passes this share of the whole, and which share
    of that one weight it passes there. Never a weight of 0."""
    cumulative_BK = weight_BK.cumsum(-1)
    whole_B1 = cumulative_BK[:, -1:]
    # The product can round up to the whole sum, which nothing passes.
    below_B1 = torch.nextafter(whole_B1, torch.zeros_like(whole_B1))
    target_B1 = torch.minimum(share_B1 * whole_B1, below_B1)
    index_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True)
    # Beyond the end only where nothing is a number.
    index_B1 = index_B1.clamp_(max=weight_BK.shape[1] - 1)
    weight_B1 = weight_BK.gather(1, index_B1)
    before_B1 = cumulative_BK.gather(1, index_B1) - weight_B1
    return index_B1, (target_B1 - before_B1).clamp_(min=0) / weight_B1


def nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """`nucleus_BV`, bool: the fewest likeliest tokens that have `top_p` or more together.

    Of equal probabilities the lower id comes first (Holtzman et al., arXiv 1904.09751).
    """
    ordered_BV, id_BV = torch.softmax(logits_BV, dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulative_BV = cumulative(ordered_BV.double())
    # A token is in while all likelier ones together fall short of `top_p`; the first always is.
    short_BV = cumulative_BV[:, :-1] < top_p * cumulative_BV[:, -1:].double()
    first_B1 = torch.ones_like(short_BV[:, :1])
    # From the order of probabilities back to ids.
    return torch.zeros_like(id_BV, dtype=torch.bool).scatter(
        1, id_BV, torch.cat([first_B1, short_BV], dim=1)
    )


def cumulative(probability_BV: Tensor) -> Tensor:
    """Cumulative sums along the vocabulary, in place; float64, or integers 2^53 times as large.

    In float32 the end can stop short of 1 on a large vocabulary. Off the CPU floats are summed in
    no fixed order, which deterministic mode refuses; integers give one sum in any order.
    """
    if probability_BV.device.type == "cpu":
        return probability_BV.cumsum_(dim=-1)
    return fixed_point(probability_BV).cumsum_(dim=-1)


def fixed_point(probability_BV: Tensor) -> Tensor:
    """Probabilities in units of 2^-53, int64: what float64 resolves just below 1."""
    return probability_BV.mul_(2.0**53).long()


def row_seeds(num_rows: int, seed: int) -> Tensor:
    """`seed_B`, int64: what rows 0 .. num_rows - 1 draw from in a call with this seed."""
    return _mix(torch.arange(num_rows) + _mix(torch.tensor(seed)))


def uniform(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """float64 in [0, 1) from (row seed, position in the response)."""
    # The upper 53 bits: as many as a float64 holds.
    return _shift(_mix(seed_B ^ _mix(position_B)), 11).double() * 2.0**-53


def _mix(value: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 (multiplication wraps): spreads nearby integers apart."""
    # 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed numbers.
    value = value + -7046029254386353131
    value = (value ^ _shift(value, 30)) * -4658895280553007687
    value = (value ^ _shift(value, 27)) * -7723592293110705685
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's `>>` on int64 keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def check_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, limit: int | None) -> None:
    """Raise ConfigError where a prompt leaves no room for a response within `limit` positions."""
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ConfigError(
            f"max_new_tokens = {max_new_tokens}: the longest prompt has {longest} tokens and "
            f"the model has {limit} positions; the most that fits is {limit - longest}"
        )


class SampleBuffer:
    """The tokens sampled so far for every row of a call, on the CPU, and the batch they make."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        pad_id: int,
        stop_ids: Sequence[int],
        num_ids: int,
    ) -> None:
        """`num_ids` is the size of the output head: no id beyond it is ever drawn."""
        self.prompts = prompts
        self.prompts_PT, self.prompt_len_P = pad_rows(prompts, pad_id)
        self.group_size, self.pad_id = group_size, pad_id
        self.max_new_tokens = max_new_tokens
        self.width = self.prompts_PT.shape[1] + max_new_tokens
        """The most tokens that a row can have."""
        self.is_stop_V = torch.zeros(num_ids, dtype=torch.bool)
        for token in stop_ids:
            if token < num_ids:
                self.is_stop_V[token] = True
        num_rows = len(prompts) * group_size
        # As many columns as the longest response needs, and up to twice that: most responses end
        # long before they must.
        columns = min(max_new_tokens, FIRST_COLUMNS)
        self.tokens_BR = torch.full((num_rows, columns), pad_id)
        self.logp_BR = torch.zeros(num_rows, columns)
        self.response_len_B = torch.zeros(num_rows, dtype=torch.int64)
        self.finished_B = torch.zeros(num_rows, dtype=torch.bool)
        # With a nucleus: ids and counts of every token, token after token in the order of drawing,
        # and which number in that order each response token has.
        self.nucleus_ids: list[Tensor] = []
        self.nucleus_counts: list[Tensor] = []
        self.num_drawn = 0
        self.drawn_BR = torch.zeros(num_rows, 0, dtype=torch.int64)

    def record(self, row_L: Tensor, position_L: Tensor, drawn: Drawn) -> Tensor:
        """Store what was drawn for response position `position_L` of these rows. Returns a bool per
        row: whether it ended."""
        nucleus_LV = drawn.nucleus_BV
        self._reach(int(position_L.max()) + 1, nucleus=nucleus_LV is not None)
        # [L], into [B, R] laid end to end.
        index_L = row_L * self.tokens_BR.shape[1] + position_L
        token_L, logp_L = drawn.token_B.cpu(), drawn.logp_B.cpu()
        if nucleus_LV is not None:
            # [L, V] -> ids, row after row; int32, since there can be thousands for each token.
            self.nucleus_ids.append(nucleus_LV.nonzero()[:, 1].to(torch.int32).cpu())
            self.nucleus_counts.append(nucleus_LV.sum(1).cpu())
            drawn_L = torch.arange(self.num_drawn, self.num_drawn + len(row_L))
            self.drawn_BR.view(-1).index_copy_(0, index_L, drawn_L)
            self.num_drawn += len(row_L)
        self.tokens_BR.view(-1).index_copy_(0, index_L, token_L)
        self.logp_BR.view(-1).index_copy_(0, index_L, logp_L)
        stopped_L = self.is_stop_V[token_L]
        ended_L = stopped_L | (position_L + 1 >= self.max_new_tokens)
        if bool(ended_L.any()):
            ended_E = row_L[ended_L]
            self.finished_B[ended_E] = stopped_L[ended_L]
            self.response_len_B[ended_E] = position_L[ended_L] + 1
        return ended_L

    def _reach(self, columns: int, *, nucleus: bool) -> None:
        """Have room for responses of so many tokens."""
        have = self.tokens_BR.shape[1]
        if columns > have:
            more = min(max(columns, 2 * have), self.max_new_tokens) - have
            self.tokens_BR = pad(self.tokens_BR, (0, more), value=self.pad_id)
            self.logp_BR = pad(self.logp_BR, (0, more))
        missing = self.tokens_BR.shape[1] - self.drawn_BR.shape[1]
        if nucleus and missing:
            self.drawn_BR = pad(self.drawn_BR, (0, missing))

    def responses(self, row_B: Tensor) -> list[list[int]]:
        """See `Sampling.responses`."""
        lengths = self.response_len_B[row_B].tolist()
        rows = self.tokens_BR[row_B].tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def batch(self, row_B: Tensor | None = None) -> Batch:
        """See `Sampling.batch`."""
        if row_B is None:
            row_B = torch.arange(len(self.response_len_B))
        prompts = [self.prompts[row // self.group_size] for row in row_B.tolist()]
        batch = Batch.from_tokens(prompts, self.responses(row_B), pad_id=self.pad_id)
        drawn_BR = torch.arange(self.tokens_BR.shape[1]) < self.response_len_B[row_B, None]
        # [B, R] -> [N]: row after row.
        batch["sampler_logp_N"] = self.logp_BR[row_B][drawn_BR]
        batch["finished_B"] = self.finished_B[row_B]
        if self.nucleus_ids:
            # From the order of drawing to row after row.
            drawn_N = self.drawn_BR[row_B][drawn_BR]
            count_N = torch.cat(self.nucleus_counts)
            batch["nucleus_count_N"] = count_N[drawn_N]
            batch["nucleus_ids_F"] = torch.cat(self.nucleus_ids)[ragged_index(count_N, drawn_N)]
        return batch


class LocalSampling:
    """A `Sampling` of rows that a loop samples into a buffer."""

    def __init__(self, samples: SampleBuffer, loop: Iterable[Tensor]) -> None:
        """`loop` yields the rows that have just ended, until all have."""
        self.samples, self.loop = samples, loop

    def __iter__(self) -> Iterator[Tensor]:
        """See `Sampling.__iter__`."""
        return iter(self.loop)

    def batch(self, row_B: Tensor | None = None) -> Batch:
        """See `Sampling.batch`."""
        return self.samples.batch(row_B)

    def responses(self, row_B: Tensor) -> list[list[int]]:
        """See `Sampling.responses`."""
        return self.samples.responses(row_B)

    def num_tokens(self, rows: Sequence[int]) -> int:
        """See `Sampling.num_tokens`."""
        prompt = int(self.samples.prompt_len_P[rows[0] // self.samples.group_size])
        return prompt + int(self.samples.response_len_B[list(rows)].sum())

    def finished(self, row_B: Tensor) -> Tensor:
        """See `Sampling.finished`."""
        return self.samples.finished_B[row_B]
