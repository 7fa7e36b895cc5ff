"""Sampling and reading for every causal LM: through transformers' own cache, without padding.

Layers with a window or a recurrent state keep no full-length keys and values that slots could
hold, and padding before a token would enter the state. So all rows of a batch are at one position.
Prompts of like length are prefilled together up to the length of the shortest. Then all move in
lockstep: a longer prompt is read on, once for its group, and where it ends its state is copied to
the group's rows, which draw. Rows that have ended leave when enough of them have; the next prompts
follow when all rows of a batch are done.

Legend: P prompts, L rows that are running (or prompts that are being read), T positions, D hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.architecture import CachedRows, evaluating
from posttrain.backends.base import Head
from posttrain.backends.outside.positions import text_config
from posttrain.backends.token_sampling import (
    SampleBuffer,
    draw,
    row_seeds,
    uniform,
)

# Moving rows copies their whole state, so they move together: when less than this share goes on.
COMPACT_BELOW = 0.75
READ_BYTES = 2**28
"""What the widest activation may take while prompts are read: a batch has fewer of them then."""


class Lockstep:
    """Samples all rows of a buffer, in batches of prompts of like length; iterating yields the rows
    that have just ended. The model is in evaluation mode meanwhile."""

    def __init__(
        self,
        model: Any,
        head: Head,
        samples: SampleBuffer,
        *,
        temperature: float,
        seed: int,
        top_p: float,
        max_rows: int,
    ) -> None:
        self.model, self.head, self.samples = model, head, samples
        self.temperature, self.top_p = temperature, top_p
        self.row_seed_B = row_seeds(len(samples.finished_B), seed)
        self.group_size = samples.group_size
        self.prompts_per_batch = max(1, max_rows // samples.group_size)

    def __iter__(self) -> Iterator[Tensor]:
        with evaluating(self.model):
            for index_P in self._batches():
                rows = _LikePrompts(self, index_P)
                while rows.running:
                    ended_L = rows.step()
                    if len(ended_L):
                        yield ended_L

    def _batches(self) -> Iterator[Tensor]:
        """Prompt numbers of one batch after another, shortest prompts first.

        A step through the rest of a prompt costs what a step of drawing does, and a batch of its
        own takes up to `max_new_tokens` of these. So lengths differ by at most half of that.
        """
        config = text_config(self.model.config)
        # Some say a width for each layer.
        width = getattr(config, "intermediate_size", None) or config.hidden_size
        width = max(width) if isinstance(width, list | tuple) else width
        token_bytes = width * self.head.weight_VD.element_size()
        length_P = self.samples.prompt_len_P
        order_P = torch.argsort(length_P, stable=True)
        lengths, start = length_P[order_P].tolist(), 0
        for end in range(1, len(lengths) + 1):
            count = end - start
            # All are read to the length of the shortest at once, which comes first.
            too_much = (count + 1) * lengths[start] * token_bytes > READ_BYTES
            if (
                count == self.prompts_per_batch
                or too_much
                or end == len(lengths)
                or lengths[end] - lengths[start] > self.samples.max_new_tokens // 2
            ):
                yield order_P[start:end]
                start = end


class _LikePrompts:
    """Prompts of like length and their rows, from the prefill to the last token."""

    # Not on the iteration as a whole: inference mode would leak into whoever takes the rows.
    @torch.inference_mode()
    def __init__(self, run: Lockstep, index_P: Tensor) -> None:
        self.run, self.device = run, run.head.weight_VD.device
        self.rows = CachedRows(run.model)
        # Of everything in the cache: its prompt, its row or -1 while the prompt is being read,
        # whether it has ended, and the hidden state at the last token.
        self.prompt_L = index_P
        self.row_L = torch.full_like(index_P, -1)
        self.done_L = torch.zeros_like(index_P, dtype=torch.bool)
        shortest = int(run.samples.prompt_len_P[index_P].min())
        # [L, T, D] -> [L, D]: at the last token that was read.
        self.hidden_LD = self.rows.read(run.samples.prompts_PT[index_P, :shortest])[:, -1]
        self._begin()

    @property
    def running(self) -> bool:
        return not bool(self.done_L.all())

    @torch.inference_mode()
    def step(self) -> Tensor:
        """One more token for everything that runs. Returns the numbers of the rows that ended."""
        run, samples = self.run, self.run.samples
        # Ended rows that are still here run along without effect.
        token_L = torch.full_like(self.row_L, samples.pad_id)
        reading_L = self.row_L < 0
        if bool(reading_L.any()):
            token_L[reading_L] = samples.prompts_PT[self.prompt_L[reading_L], self.rows.length]
        draws_L = ~reading_L & ~self.done_L
        ended_L = torch.zeros_like(self.done_L)
        if bool(draws_L.any()):
            row_L = self.row_L[draws_L]
            prompt_len_L = samples.prompt_len_P[self.prompt_L[draws_L]]
            # All rows have one length by now, so those of their responses may differ.
            position_L = self.rows.length - prompt_len_L
            hidden_LD = self.hidden_LD[draws_L.to(self.device)]
            weight, bias = run.head.weight_VD, run.head.bias_V
            logits_LV = torch.nn.functional.linear(hidden_LD, weight, bias)
            uniform_L = uniform(run.row_seed_B[row_L], position_L).to(self.device)
            drawn = draw(logits_LV, uniform_L, run.temperature, run.top_p)
            token_L[draws_L] = drawn.token_B.cpu()
            ended_L[draws_L] = samples.record(row_L, position_L, drawn)
        self.done_L |= ended_L
        ended_rows_L = self.row_L[ended_L]
        if self.running:
            token_L = self._retire(token_L)
            self.hidden_LD = self.rows.read(token_L[:, None])[:, -1]
            self._begin()
        # A copy of the indices that may take part in whatever the caller does with them.
        with torch.inference_mode(False):
            return ended_rows_L.clone()

    def _begin(self) -> None:
        """Where a prompt ends at this position, make its group's rows of it."""
        group, length_P = self.run.group_size, self.run.samples.prompt_len_P
        begins_L = (self.row_L < 0) & (length_P[self.prompt_L] == self.rows.length)
        if not bool(begins_L.any()):
            return
        # Everything stays once; what has read its prompt becomes the rows of a group.
        count_L = torch.where(begins_L, group, 1)
        copy_L = torch.arange(len(count_L)).repeat_interleave(count_L)
        # 0, 1, 2 ... within each group, 0 for all that just stays.
        member_L = torch.arange(len(copy_L)) - (count_L.cumsum(0) - count_L)[copy_L]
        self._take(copy_L)
        new_L = self.prompt_L * group + member_L
        self.row_L = torch.where(begins_L[copy_L], new_L, self.row_L)

    def _retire(self, token_L: Tensor) -> Tensor:
        """Drop the ended rows when there are enough of them; returns the tokens that are left."""
        keep_L = (~self.done_L).nonzero()[:, 0]
        if len(keep_L) >= COMPACT_BELOW * len(self.row_L):
            return token_L
        self._take(keep_L)
        return token_L[keep_L]

    def _take(self, index_L: Tensor) -> None:
        """Put `index_L` of what is in the cache in place of all that is there."""
        self.rows.select(index_L)
        self.hidden_LD = self.hidden_LD[index_L.to(self.device)]
        self.prompt_L, self.row_L = self.prompt_L[index_L], self.row_L[index_L]
        self.done_L = self.done_L[index_L]
