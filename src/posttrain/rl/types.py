"""What a sampler returns and a learner consumes: whole rollouts as right-padded tensors.

Legend: B rows, T positions of prompt + response, R response positions, N flat response tokens.

Right padding is a choice: with causal attention a padded position is never seen by a real one, so
scoring and learning need no attention mask at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.rl.kept import Kept, flat_index


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """A batch of sampled responses with the log-probs of the policy that sampled them.

    Example: two rows, prompts of 3 and 2 tokens, responses of 2 (ended by a stop token) and 3::

        tokens_BT     [[7, 8, 9, 4, 2], [5, 6, 4, 4, 4]]
        prompt_len_B  [3, 2]       response_len_B [2, 3]
        logp_BR       [[-.1, -.2, 0], [-.3, -.1, -.4]]
        finished_B    [True, False]              # the second was cut at the length limit
    """

    tokens_BT: Tensor
    """int64, prompt then response (stop token included), then padding."""
    prompt_len_B: Tensor
    """int64, number of prompt tokens."""
    response_len_B: Tensor
    """int64, number of response tokens, stop token included."""
    logp_BR: Tensor
    """float32, log-prob of each response token under the sampling policy; 0 in padding."""
    finished_B: Tensor
    """bool, True where the row ended with a stop token."""
    kept: Kept | None = None
    """The ids that each response token was drawn from, row after row; None for all ids."""

    def __len__(self) -> int:
        return int(self.tokens_BT.shape[0])

    @property
    def num_tokens(self) -> int:
        """Number of response tokens of all rows."""
        return int(self.response_len_B.sum())

    def rows(self, index: Tensor) -> Rollouts:
        """The rows at `index` (int64 or bool), trimmed to the longest of them."""
        lengths = (self.prompt_len_B + self.response_len_B)[index]
        num_columns = int(lengths.max()) if lengths.numel() else 0
        num_responses = int(self.response_len_B[index].max()) if lengths.numel() else 0
        return replace(
            self,
            tokens_BT=self.tokens_BT[index, :num_columns],
            prompt_len_B=self.prompt_len_B[index],
            response_len_B=self.response_len_B[index],
            logp_BR=self.logp_BR[index, :num_responses],
            finished_B=self.finished_B[index],
            kept=None if self.kept is None else self._kept_rows(self.kept, index),
        )

    def _kept_rows(self, kept: Kept, index: Tensor) -> Kept:
        start_B = self.response_len_B.cumsum(0) - self.response_len_B
        rows_B = torch.arange(len(self), device=index.device)[index]
        return kept.tokens(flat_index(start_B, self.response_len_B, rows_B))

    def to(self, device: torch.device) -> Rollouts:
        """The same rows on another device; these themselves where they are on it."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device),
            prompt_len_B=self.prompt_len_B.to(device),
            response_len_B=self.response_len_B.to(device),
            logp_BR=self.logp_BR.to(device),
            finished_B=self.finished_B.to(device),
            kept=None if self.kept is None else self.kept.to(device),
        )

    def response_mask_BT(self) -> Tensor:
        """bool, True at positions that hold a response token."""
        position_T = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device)
        start_B1 = self.prompt_len_B[:, None]
        return (position_T >= start_B1) & (position_T < start_B1 + self.response_len_B[:, None])

    def row_N(self) -> Tensor:
        """int64, the row of each response token, row after row."""
        row_B = torch.arange(len(self), device=self.response_len_B.device)
        return row_B.repeat_interleave(self.response_len_B)

    def sampler_logp_N(self) -> Tensor:
        """`logp_BR` of all response tokens, row after row: the order of every `_N` tensor."""
        position_R = torch.arange(self.logp_BR.shape[1], device=self.logp_BR.device)
        return self.logp_BR[position_R < self.response_len_B[:, None]]

    def responses(self) -> list[list[int]]:
        """Response token ids of every row, stop token included."""
        rows = self.tokens_BT.tolist()
        starts, lengths = self.prompt_len_B.tolist(), self.response_len_B.tolist()
        return [
            row[start : start + length]
            for row, start, length in zip(rows, starts, lengths, strict=True)
        ]


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-pad token lists: `(tokens_BT, length_B)`, both int64."""
    length_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    num_columns = int(length_B.max()) if len(rows) else 0
    padded = [list(row) + [pad_id] * (num_columns - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), num_columns), length_B
