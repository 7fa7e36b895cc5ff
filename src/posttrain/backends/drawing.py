"""What all samplers share: the draw, a random number per row and position, and the record of it.

A token is drawn by inverse transform from one uniform number that depends only on (seed, row,
position), so that a row's response depends neither on the rows beside it nor on the sampler.

Legend: P prompts, B rows, L rows that are running, T positions, R response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.rl.types import Rollouts, pad_rows


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob: inverse transform, or the arg max at temperature 0.

    Draws the first token whose cumulative probability passes the row's uniform number. The
    cumulative sum is in float64: in float32 its end can stop short of 1 on a large vocabulary.
    """
    if temperature == 0:
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        token_B = logits_BV.argmax(dim=-1)
    else:
        logp_BV = torch.log_softmax(logits_BV / temperature, dim=-1)
        cumulative_BV = logp_BV.double().exp_().cumsum(dim=-1)
        target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
        token_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
        token_B = token_B.clamp_(max=logits_BV.shape[1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None])[:, 0]


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
    ) -> None:
        self.prompts_PT, self.prompt_len_P = pad_rows(prompts, pad_id)
        self.group_size, self.pad_id, self.stop_ids = group_size, pad_id, stop_ids
        self.max_new_tokens = max_new_tokens
        num_rows = len(prompts) * group_size
        self.tokens_BR = torch.full((num_rows, max_new_tokens), pad_id)
        self.logp_BR = torch.zeros(num_rows, max_new_tokens)
        self.response_len_B = torch.zeros(num_rows, dtype=torch.int64)
        self.finished_B = torch.zeros(num_rows, dtype=torch.bool)

    def record(self, row_L: Tensor, at_L: Tensor, token_L: Tensor, logp_L: Tensor) -> Tensor:
        """Store token number `at_L` of these rows. Returns a bool per row: whether it ended."""
        self.tokens_BR[row_L, at_L] = token_L
        self.logp_BR[row_L, at_L] = logp_L
        stopped_L = torch.isin(token_L, self.stop_ids)
        self.finished_B[row_L[stopped_L]] = True
        ended_L = stopped_L | (at_L + 1 >= self.max_new_tokens)
        self.response_len_B[row_L[ended_L]] = at_L[ended_L] + 1
        return ended_L

    def rollouts(self) -> Rollouts:
        """Everything drawn, as one right-padded batch."""
        prompt_len_B = self.prompt_len_P.repeat_interleave(self.group_size)
        num_rows, columns = len(prompt_len_B), self.prompts_PT.shape[1]
        longest = int(self.response_len_B.max()) if num_rows else 0
        tokens_BT = torch.full((num_rows, columns + longest), self.pad_id)
        tokens_BT[:, :columns] = self.prompts_PT.repeat_interleave(self.group_size, dim=0)
        position_R = torch.arange(longest)
        valid_BR = position_R < self.response_len_B[:, None]
        at_BR = prompt_len_B[:, None] + position_R
        row_BR = torch.arange(num_rows)[:, None].expand_as(at_BR)
        tokens_BT[row_BR[valid_BR], at_BR[valid_BR]] = self.tokens_BR[:, :longest][valid_BR]
        used = int((prompt_len_B + self.response_len_B).max()) if num_rows else 0
        return Rollouts(
            tokens_BT=tokens_BT[:, :used].clone(),
            prompt_len_B=prompt_len_B,
            response_len_B=self.response_len_B.clone(),
            logp_BR=self.logp_BR[:, :longest] * valid_BR,
            finished_B=self.finished_B.clone(),
        )
