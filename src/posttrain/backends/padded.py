"""Rows into forward passes of plain transformers: each row on its own line, padded on the right.

This is right for any causal model, attending or recurrent, and the only way for some: causal layers
never see what comes after a token, so padding needs no mask and positions need no ids. Rows of like
length go together. The faster ways (`cpu/packing.py`, `cpu/flat.py`) must give the same numbers.

Legend: B rows, T positions of a row, N sampled tokens (row after row), D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.backends.architecture import backbone
from posttrain.backends.recompute import recomputing
from posttrain.rl.batch import Batch


class ForwardPass(Protocol):
    """Rows of a batch that go through a model at once."""

    @property
    def index_B(self) -> Tensor:
        """int64, which rows of the batch, in the order in which `hidden_states` returns them."""
        ...

    @property
    def num_positions(self) -> int:
        """How many positions go through the layers, padding among them."""
        ...

    def hidden_states(self, model: Any, body: Any = None, *, checkpointing: bool = False) -> Tensor:
        """`hidden_ND`, the last hidden states that predict the sampled tokens of these rows.

        `body` is a compiled form of the model's backbone. With `checkpointing` layers keep their
        inputs alone for the backward pass (`recompute.py`).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PaddedPass:
    """A `ForwardPass` with one line for each row."""

    index_B: Tensor
    """Ascending; the lines have another order."""
    tokens_BT: Tensor
    predicts_N: Tensor
    """int64, for each sampled token the position that predicts it when the lines are laid end to
    end."""

    @property
    def num_positions(self) -> int:
        """See `ForwardPass.num_positions`."""
        return self.tokens_BT.numel()

    def hidden_states(self, model: Any, body: Any = None, *, checkpointing: bool = False) -> Tensor:
        """See `ForwardPass.hidden_states`."""
        body = backbone(model) if body is None else body
        with recomputing(model, checkpointing):
            hidden_BTD: Tensor = body(
                input_ids=self.tokens_BT.to(model.device), use_cache=False
            ).last_hidden_state
        # [B, T, D] -> [B * T, D] -> [N, D]: just the positions that predict a sampled token.
        return hidden_BTD.flatten(0, 1)[self.predicts_N.to(model.device)]


def read_lengths(batch: Batch) -> Tensor:
    """`read_len_B`, int64: how many tokens of each row have to be read.

    All before its last sampled token, which itself predicts nothing that is wanted; the prompt
    where no token was sampled.
    """
    width = batch.tokens_BT.shape[1]
    position_T = torch.arange(width, device=batch.device)
    last_sampled_B = (batch.sampled_BT * position_T).amax(1) if width else batch.prompt_len_B
    return torch.maximum(last_sampled_B, batch.prompt_len_B)


def padded_passes(batch: Batch, *, max_tokens: int, group_rows: int) -> Iterator[PaddedPass]:
    """All rows, longest first, in passes of at most `max_tokens` positions or one block of rows.

    Every `group_rows` adjacent rows are a block that stays in one pass.
    """
    read_len_B = read_lengths(batch)
    read_len: list[int] = read_len_B.tolist()
    rows = list(range(len(batch)))
    blocks = [rows[first : first + group_rows] for first in range(0, len(rows), group_rows)]

    def longest(block: list[int]) -> int:
        return max(read_len[row] for row in block)

    passes: list[tuple[list[int], int]] = []
    lines: list[int] = []
    width = 0
    # A stable sort, so that the passes follow from the batch alone.
    for block in sorted(blocks, key=longest, reverse=True):
        if not lines or (len(lines) + len(block)) * width > max_tokens:
            lines, width = [], longest(block)
            passes.append((lines, width))
        lines += block
    for lines, width in passes:
        yield _padded_pass(batch, read_len_B, torch.tensor(lines, device=batch.device), width)


def _padded_pass(batch: Batch, read_len_B: Tensor, row_B: Tensor, width: int) -> PaddedPass:
    """The rows `row_B`, line by line."""
    beyond_BT = torch.arange(width, device=batch.device) >= read_len_B[row_B, None]
    # Lines are longest first; hidden states come in the order of the batch.
    index_B, line_B = row_B.sort()
    # [N, 2]: row after row, and from left to right within a row.
    row_N, column_N = batch.sampled_BT[index_B].nonzero().T
    return PaddedPass(
        index_B=index_B,
        # The last sampled token goes too: nobody asks what follows it. 0 is an id of any model.
        tokens_BT=batch.tokens_BT[row_B, :width].masked_fill(beyond_BT, 0),
        # A token is predicted by the position before it.
        predicts_N=line_B[row_N] * width + column_N - 1,
    )
