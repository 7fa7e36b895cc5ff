"""Sampling and reading for every causal LM: through transformers' own cache, without padding.

Layers with a window or a recurrent state keep no full-length keys and values that slots could
hold, and padding before a token would enter the state. So prompts of one length are prefilled
together, once for each group; their states are copied to the group's rows, which then move in
lockstep. Rows that have ended leave when enough of them have; the next prompts follow when all
rows of a batch are done.

Legend: P prompts, B rows, L rows that are running, T positions, N flat response tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.architecture import CachedRows, backbone
from posttrain.backends.base import Head
from posttrain.backends.drawing import Drawn, draw, row_seeds, uniform
from posttrain.rl.types import Rollouts

# Moving rows copies their whole state, so they move together: when less than this share goes on.
COMPACT_BELOW = 0.75


class Lockstep:
    """One call to `Sampler.sample`. Iterate to its end, then take `rollouts()`.

    Iterating gives an int64 tensor of row numbers whenever rows have ended, each row once. The
    model is put into evaluation mode while the iteration runs.
    """

    def __init__(
        self,
        model: Any,
        head: Head,
        prompts: Sequence[Sequence[int]],
        *,
        stop_ids: Tensor,
        pad_id: int,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        max_rows: int = 256,
    ) -> None:
        self.model, self.head, self.temperature = model, head, temperature
        self.drawn = Drawn(
            prompts,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            pad_id=pad_id,
            stop_ids=stop_ids.cpu(),
        )
        self.seed_B = row_seeds(len(prompts) * group_size, seed)
        self.group_size = group_size
        self.prompts_per_batch = max(1, max_rows // group_size)

    def __iter__(self) -> Iterator[Tensor]:
        was_training = self.model.training
        self.model.eval()
        try:
            for index_P in self._batches():
                batch = _Batch(self, index_P)
                while batch.running:
                    ended_L = batch.step()
                    if len(ended_L):
                        yield ended_L
        finally:
            self.model.train(was_training)

    def rollouts(self) -> Rollouts:
        """All rows, in the order of the prompts; right-padded, on the CPU."""
        return self.drawn.rollouts()

    def _batches(self) -> Iterator[Tensor]:
        """Prompt numbers of one batch after another: all of one length, in their order."""
        length_P = self.drawn.prompt_len_P
        for length in length_P.unique().tolist():
            index_P = (length_P == length).nonzero()[:, 0]
            yield from index_P.split(self.prompts_per_batch)


class _Batch:
    """The rows of prompts of one length, from their prefill to their last token."""

    # Not on the iteration as a whole: inference mode would leak into whoever takes the rows.
    @torch.inference_mode()
    def __init__(self, run: Lockstep, index_P: Tensor) -> None:
        self.run, self.sampled = run, 0
        self.device = run.head.weight_VD.device
        self.rows = CachedRows(run.model)
        length, group = int(run.drawn.prompt_len_P[index_P[0]]), run.group_size
        hidden_PD = self.rows.read(run.drawn.prompts_PT[index_P, :length])[:, -1]
        copy_L = torch.arange(len(index_P)).repeat_interleave(group)
        self.rows.select(copy_L)
        self.hidden_LD = hidden_PD[copy_L.to(self.device)]
        self.row_L = index_P[copy_L] * group + torch.arange(group).repeat(len(index_P))
        self.done_L = torch.zeros_like(self.row_L, dtype=torch.bool)

    @property
    def running(self) -> bool:
        return not bool(self.done_L.all())

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Draw one token for every row and read it. Returns the numbers of rows that ended."""
        run = self.run
        weight, bias = run.head.weight_VD, run.head.bias_V
        logits_LV = torch.nn.functional.linear(self.hidden_LD, weight, bias).float()
        position_L = torch.full_like(self.row_L, self.sampled)
        uniform_L = uniform(run.seed_B[self.row_L], position_L).to(self.device)
        drawn_L, drawn_logp_L = draw(logits_LV, uniform_L, run.temperature)
        token_L, logp_L = drawn_L.cpu(), drawn_logp_L.cpu()
        live_L = ~self.done_L
        ended_L = torch.zeros_like(self.done_L)
        ended_L[live_L] = run.drawn.record(
            self.row_L[live_L], self.sampled, token_L[live_L], logp_L[live_L]
        )
        self.sampled += 1
        self.done_L |= ended_L
        ended_rows_L = self.row_L[ended_L]
        if self.running:
            token_L = self._retire(token_L)
            # Rows that ended and are still here run along without effect.
            self.hidden_LD = self.rows.read(token_L[:, None])[:, -1]
        # A copy of the indices that may take part in whatever the caller does with them.
        with torch.inference_mode(False):
            return ended_rows_L.clone()

    def _retire(self, token_L: Tensor) -> Tensor:
        """Drop the ended rows when there are enough of them; returns the tokens that are left."""
        keep_L = (~self.done_L).nonzero()[:, 0]
        if len(keep_L) >= COMPACT_BELOW * len(self.row_L):
            return token_L
        self.rows.select(keep_L)
        self.row_L, self.done_L = self.row_L[keep_L], self.done_L[keep_L]
        return token_L[keep_L]


def padded_hidden_states(model: Any, rollouts: Rollouts) -> Tensor:
    """`hidden_ND`: last hidden states that predict the response tokens, row after row.

    One row of the batch is one row of the forward pass, padded on the right: causal layers,
    attending or recurrent, never see what comes after a token. Differentiable.
    """
    # Position t predicts token t + 1, so the last token of a row need not be read.
    tokens_BT = rollouts.tokens_BT[:, :-1].to(model.get_output_embeddings().weight.device)
    hidden_BTD = backbone(model)(input_ids=tokens_BT, use_cache=False).last_hidden_state
    predicts_BT = rollouts.response_mask_BT()[:, 1:].to(hidden_BTD.device)
    return hidden_BTD[predicts_BT]
