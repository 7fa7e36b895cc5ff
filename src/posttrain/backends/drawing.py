"""What all samplers share: the draw, a random number per row and position, and the record of it.

A token is drawn by inverse transform from one uniform number that depends only on (seed, row,
position), so that a row's response depends neither on the rows beside it nor on the sampler.

Legend: P prompts, B rows, L rows that are running, E rows that have just ended, T positions,
R response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.rl.kept import Kept, joined_kept, kept_of
from posttrain.rl.types import Rollouts, pad_rows


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob: inverse transform, or the arg max at temperature 0.

    Draws the first token whose cumulative probability passes the row's uniform number.
    """
    if temperature == 0:
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        token_B = logits_BV.argmax(dim=-1)
    else:
        if temperature != 1:
            logits_BV = logits_BV / temperature
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        cumulative_BV = cumulative(logp_BV.double().exp_())
        target_B1 = (uniform_B[:, None] * cumulative_BV[:, -1:]).to(cumulative_BV.dtype)
        token_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
        token_B = token_B.clamp_(max=logits_BV.shape[1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None])[:, 0]


def masked(logits_BV: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor | None]:
    """The logits with -inf outside each row's nucleus, and `kept_BV`, bool, the nucleus.

    With `top_p` 1 the logits as they are and None.
    """
    if top_p == 1:
        return logits_BV, None
    kept_BV = nucleus(logits_BV / temperature, top_p)
    return logits_BV.masked_fill(~kept_BV, -torch.inf), kept_BV


def nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """`kept_BV`, bool: the fewest likeliest tokens whose probabilities add up to `top_p` or more.

    Of equal probabilities the lower id comes first (Holtzman et al., arXiv 1904.09751).
    """
    ordered_BV, id_BV = torch.softmax(logits_BV, dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulative_BV = cumulative(ordered_BV.double())
    short_BV = cumulative_BV[:, :-1] < top_p * cumulative_BV[:, -1:].double()
    first_B1 = torch.ones_like(short_BV[:, :1])
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
    return _shift(_mix(seed_B ^ _mix(position_B)), 11).double() * 2.0**-53


def _mix(value: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 (multiplication wraps): spreads nearby integers apart."""
    value = value + -7046029254386353131
    value = (value ^ _shift(value, 30)) * -4658895280553007687
    value = (value ^ _shift(value, 27)) * -7723592293110705685
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's `>>` on int64 keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


class Drawn:
    """The tokens drawn so far for every row, on the CPU, and the rollouts that they make."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        pad_id: int,
        stop_ids: Tensor,
        num_ids: int,
    ) -> None:
        """`num_ids` is the size of the output layer: no id beyond it is ever drawn."""
        self.prompts_PT, self.prompt_len_P = pad_rows(prompts, pad_id)
        self.group_size, self.pad_id = group_size, pad_id
        self.max_new_tokens = max_new_tokens
        self.stops_V = torch.zeros(num_ids, dtype=torch.bool)
        self.stops_V[stop_ids[stop_ids < num_ids]] = True
        num_rows = len(prompts) * group_size
        self.tokens_BR = torch.full((num_rows, max_new_tokens), pad_id)
        self.logp_BR = torch.zeros(num_rows, max_new_tokens)
        self.response_len_B = torch.zeros(num_rows, dtype=torch.int64)
        self.finished_B = torch.zeros(num_rows, dtype=torch.bool)
        # With a nucleus: that of every token in the order of drawing, and where a row's stand.
        self.kept: list[Kept] = []
        self.num_kept = 0
        self.kept_at_BR = torch.zeros(num_rows, max_new_tokens, dtype=torch.int64)

    def record(
        self,
        row_L: Tensor,
        at_L: Tensor,
        token_L: Tensor,
        logp_L: Tensor,
        kept_LV: Tensor | None = None,
    ) -> Tensor:
        """Store token number `at_L` of these rows, drawn from `kept_LV` or from all ids. Returns a
        bool per row: whether it ended."""
        flat_L = row_L * self.max_new_tokens + at_L
        if kept_LV is not None:
            self.kept.append(kept_of(kept_LV))
            place_L = torch.arange(self.num_kept, self.num_kept + len(row_L))
            self.kept_at_BR.view(-1).index_copy_(0, flat_L, place_L)
            self.num_kept += len(row_L)
        self.tokens_BR.view(-1).index_copy_(0, flat_L, token_L)
        self.logp_BR.view(-1).index_copy_(0, flat_L, logp_L)
        stopped_L = self.stops_V[token_L]
        ended_L = stopped_L | (at_L + 1 >= self.max_new_tokens)
        if bool(ended_L.any()):
            ended_E = row_L[ended_L]
            self.finished_B[ended_E] = stopped_L[ended_L]
            self.response_len_B[ended_E] = at_L[ended_L] + 1
        return ended_L

    def responses(self, row_B: Tensor) -> list[list[int]]:
        """Token ids of these rows, all of which have ended; stop token included."""
        lengths = self.response_len_B[row_B].tolist()
        rows = self.tokens_BR[row_B].tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def num_tokens(self, rows: Sequence[int]) -> int:
        """Tokens of these rows of one group, all of which have ended; their prompt counts once."""
        prompt = int(self.prompt_len_P[rows[0] // self.group_size])
        return prompt + int(self.response_len_B[list(rows)].sum())

    def rollouts(self, row_B: Tensor | None = None) -> Rollouts:
        """The rows `row_B`, all of which have ended, or all rows, as one right-padded batch."""
        if row_B is None:
            row_B = torch.arange(len(self.response_len_B))
        prompt_B = row_B // self.group_size
        prompt_len_B, response_len_B = self.prompt_len_P[prompt_B], self.response_len_B[row_B]
        longest = int(response_len_B.max()) if len(row_B) else 0
        used = int((prompt_len_B + response_len_B).max()) if len(row_B) else 0
        tokens_BT = torch.full((len(row_B), self.prompts_PT.shape[1] + longest), self.pad_id)
        tokens_BT[:, : self.prompts_PT.shape[1]] = self.prompts_PT[prompt_B]
        position_R = torch.arange(longest)
        valid_BR = position_R < response_len_B[:, None]
        response_BR = torch.where(valid_BR, self.tokens_BR[row_B, :longest], self.pad_id)
        tokens_BT.scatter_(1, prompt_len_B[:, None] + position_R, response_BR)
        return Rollouts(
            tokens_BT=tokens_BT[:, :used].clone(),
            prompt_len_B=prompt_len_B,
            response_len_B=response_len_B,
            logp_BR=self.logp_BR[row_B, :longest] * valid_BR,
            finished_B=self.finished_B[row_B],
            kept=self._kept_of(row_B, valid_BR),
        )

    def _kept_of(self, row_B: Tensor, valid_BR: Tensor) -> Kept | None:
        """What the response tokens of these rows were drawn from; None for all ids."""
        if not self.kept:
            return None
        place_BR = self.kept_at_BR[row_B, : valid_BR.shape[1]]
        return joined_kept(self.kept).tokens(place_BR[valid_BR])
