"""Sampling in slots: a row that ends makes room at once, and waiting prompts take its place.

Each prompt is read once for its whole group. A row's random numbers depend only on (seed, row,
position), so its response does not depend on which rows happen to run beside it. Log-probs come
from the same pass. Models that have no fused decoder are sampled in lockstep (`lockstep.py`).

Legend: P prompts, L rows in slots, E rows that have just ended, M rows that move, B rows,
T positions, R response positions, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.architecture import evaluating
from posttrain.backends.base import Head
from posttrain.backends.budget import MAX_COPIED, MAX_COPIED_BFLOAT16
from posttrain.backends.cpu.cache import Cache
from posttrain.backends.cpu.fused import READ_BYTES, FusedDecoder
from posttrain.backends.cpu.product import Product, is_bfloat16_on_cpu
from posttrain.backends.token_sampling import (
    SampleBuffer,
    draw,
    row_seeds,
    uniform,
)

READ_SHARE = 8
"""Waiting prompts are read when they can have this part of the slots, not whenever one is free: a
forward pass over a few prompts costs nearly as much as one over many."""


class Decoders:
    """Makes the decoders of one model, each of which may take over the memory of the last."""

    def __init__(self, model: Any, read_bytes: int = READ_BYTES) -> None:
        """`read_bytes` as for a `FusedDecoder`."""
        self.model, self.read_bytes = model, read_bytes
        self.cache: Cache | None = None

    def make(self, num_slots: int, num_positions: int) -> FusedDecoder:
        """A decoder with room for so many rows of so many tokens."""
        # Taken, not shared: a decoder that is made meanwhile gets memory of its own.
        cache, self.cache = self.cache, None
        decoder = FusedDecoder(
            self.model,
            num_slots=num_slots,
            num_positions=num_positions,
            cache=cache,
            read_bytes=self.read_bytes,
        )
        self.cache = decoder.cache
        return decoder


def _projection(head: Head) -> Callable[[Tensor], Tensor]:
    """The output layer. Large ones are not copied for the few rows of a step."""
    bfloat16 = is_bfloat16_on_cpu(head.weight_VD)
    if head.weight_VD.numel() > (MAX_COPIED_BFLOAT16 if bfloat16 else MAX_COPIED):
        return partial(torch.nn.functional.linear, weight=head.weight_VD, bias=head.bias_V)
    return Product(head.weight_VD.detach(), None if head.bias_V is None else head.bias_V.detach())


class Slots:
    """Samples all rows of a buffer in slots 0..L-1 of a decoder; iterating yields the rows that
    have just ended. The model is in evaluation mode meanwhile."""

    def __init__(
        self,
        decoders: Decoders,
        head: Head,
        samples: SampleBuffer,
        *,
        temperature: float,
        seed: int,
        top_p: float,
        max_rows: int,
    ) -> None:
        self.model, self.head, self.samples = decoders.model, head, samples
        self.temperature, self.top_p = temperature, top_p
        self.project = _projection(head)
        num_rows, self.max_new_tokens = len(samples.finished_B), samples.max_new_tokens
        # A group is always admitted whole.
        self.num_slots = min(num_rows, max(max_rows, samples.group_size))
        num_positions = samples.prompts_PT.shape[1] + self.max_new_tokens
        self.decoder = decoders.make(self.num_slots, num_positions)
        self.row_seed_B = row_seeds(num_rows, seed)
        self.next_prompt = 0
        # Of the rows in slots: their number in the buffer, how many tokens of them are read and how
        # many are drawn, their random numbers, and the hidden state that predicts the next token.
        self.row_L = torch.empty(0, dtype=torch.int64)
        self.length_L, self.position_L = self.row_L, self.row_L
        self.uniform_LR = torch.empty(0, self.max_new_tokens, dtype=torch.float64)
        self.hidden_LD: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        with evaluating(self.model):
            while len(self.row_L) or self.waiting:
                ended_E = self._advance()
                if ended_E is not None:
                    yield ended_E

    @property
    def waiting(self) -> bool:
        """Whether some prompts have no slot yet."""
        return self.next_prompt < len(self.samples.prompt_len_P)

    # Not around the loop: whoever takes the rows in between must not compute in this mode.
    @torch.inference_mode()
    def _advance(self) -> Tensor | None:
        """One token for every row in a slot; the rows that ended with it, or None."""
        self._admit()
        assert self.hidden_LD is not None
        weight = self.head.weight_VD
        logits_LV = self.project(self.hidden_LD)
        # [L, R] -> [L]: the number for the next position of each row.
        uniform_L = self.uniform_LR.gather(1, self.position_L[:, None])[:, 0].to(weight.device)
        drawn = draw(logits_LV, uniform_L, self.temperature, self.top_p)
        token_L = drawn.token_B.cpu()
        ended_L = self.samples.record(self.row_L, self.position_L, drawn)
        self.position_L = self.position_L + 1
        ended_E = None
        if bool(ended_L.any()):
            # Free of this mode, for whoever indexes with it where gradients are recorded.
            with torch.inference_mode(False):
                ended_E = self.row_L[ended_L].clone()
            token_L = self._retire(ended_L, token_L)
        if len(token_L):
            length_L = self.length_L.to(weight.device)
            self.hidden_LD = self.decoder.step(token_L.to(weight.device), length_L)
            self.length_L = self.length_L + 1
        return ended_E

    def _admit(self) -> None:
        """Read waiting prompts into free slots, each prompt once for its whole group."""
        samples = self.samples
        live, group = len(self.row_L), samples.group_size
        room = (self.num_slots - live) // group
        enough = room * group * READ_SHARE >= self.num_slots
        if not self.waiting or room == 0 or (live and not enough):
            return
        first = self.next_prompt
        self.next_prompt = min(first + room, len(samples.prompt_len_P))
        length_P = samples.prompt_len_P[first : self.next_prompt]
        tokens_PT = samples.prompts_PT[first : self.next_prompt, : int(length_P.max())]
        device = self.head.weight_VD.device
        hidden_PD = self.decoder.prefill(
            tokens_PT.to(device), length_P.to(device), first=live, copies=group
        )
        row_L = torch.arange(first * group, self.next_prompt * group)
        uniform_LR = uniform(self.row_seed_B[row_L, None], torch.arange(self.max_new_tokens))
        # [P, D] -> [L, D]: the rows of a group begin at one state.
        hidden_LD = hidden_PD.repeat_interleave(group, dim=0)
        self.row_L = torch.cat([self.row_L, row_L])
        self.length_L = torch.cat([self.length_L, length_P.repeat_interleave(group)])
        self.position_L = torch.cat([self.position_L, torch.zeros_like(row_L)])
        self.uniform_LR = torch.cat([self.uniform_LR, uniform_LR])
        if self.hidden_LD is not None:
            hidden_LD = torch.cat([self.hidden_LD, hidden_LD])
        self.hidden_LD = hidden_LD

    def _retire(self, ended_L: Tensor, token_L: Tensor) -> Tensor:
        """Give up the slots of ended rows: the last rows move into the holes before them.

        Returns the tokens of the rows that go on, in their new order.
        """
        keep_L = (~ended_L).nonzero()[:, 0]
        live = len(keep_L)
        # As many rows stand beyond `live` as there are holes before it.
        source_M, target_M = keep_L[keep_L >= live], ended_L[:live].nonzero()[:, 0]
        if len(source_M):
            device = self.head.weight_VD.device
            self.decoder.move(source_M.to(device), target_M.to(device))
        order_L = torch.arange(live)
        order_L[target_M] = source_M
        # `hidden_LD` keeps the old order: the next decode step replaces it.
        self.row_L, self.length_L = self.row_L[order_L], self.length_L[order_L]
        self.position_L, self.uniform_LR = self.position_L[order_L], self.uniform_LR[order_L]
        if not live:
            self.hidden_LD = None
        return token_L[order_L]
