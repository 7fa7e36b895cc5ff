"""Sampling in slots: a row that ends makes room at once, and waiting prompts take its place.

Each prompt is read once for its whole group. A row's random numbers depend only on (seed, row,
position), so its response does not depend on which rows happen to run beside it. Log-probs come
from the same pass. Models for which slots do not work are sampled in lockstep (`lockstep.py`).

Legend: P prompts, L rows in slots, E rows that have just ended, M rows that move, T positions,
R response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.architecture import path_of
from posttrain.backends.base import Head, Sampling
from posttrain.backends.checkpoint import LanguageModel, output_head
from posttrain.backends.decoder import Decoder, TransformersDecoder
from posttrain.backends.drawing import Drawn, draw, masked, row_seeds, uniform
from posttrain.backends.fused import FusedDecoder, is_fusable
from posttrain.backends.lockstep import Lockstep
from posttrain.backends.product import Product
from posttrain.engine.errors import ConfigError
from posttrain.rl.types import Rollouts

READ_SHARE = 8
"""Waiting prompts are read when they can have this part of the slots, not whenever one is free: a
forward pass over a few prompts costs nearly as much as one over many."""


MAX_COPIED = 2**24
"""Elements up to which the output layer is laid out anew for each call."""


class LocalSampler:
    """A `Sampler` over a transformers model in this process."""

    def __init__(self, language_model: LanguageModel, *, max_rows: int = 256) -> None:
        self.model: Any = language_model.model
        self.head: Head = output_head(language_model.model)
        self.stop_ids = torch.tensor(language_model.stop_ids)
        self.pad_id = language_model.pad_id
        self.max_rows = max_rows
        self._buffer: Tensor | None = None

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
    ) -> Rollouts:
        """See `Sampler.sample`. Raises ConfigError if a prompt leaves no room for a response."""
        sampling = self.stream(
            prompts,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            top_p=top_p,
        )
        for _ in sampling:
            pass
        return sampling.rollouts()

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
    ) -> Sampling:
        """See `Sampler.stream`. Raises ConfigError if a prompt leaves no room for a response."""
        self._check_lengths(prompts, max_new_tokens)
        drawn = Drawn(
            prompts,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            pad_id=self.pad_id,
            stop_ids=self.stop_ids,
            num_ids=len(self.head.weight_VD),
        )
        settings: dict[str, Any] = {"temperature": temperature, "seed": seed, "top_p": top_p}
        if path_of(self.model) == "plain":
            return Lockstep(self.model, self.head, drawn, max_rows=self.max_rows, **settings)
        return Slots(self, drawn, **settings)

    def decoder(self, num_slots: int, num_positions: int) -> Decoder:
        """The fastest decoder that computes this model."""
        shape = {"num_slots": num_slots, "num_positions": num_positions}
        if not is_fusable(self.model):
            return TransformersDecoder(self.model, **shape)
        buffer, self._buffer = self._buffer, None
        decoder = FusedDecoder(self.model, **shape, buffer=buffer)
        self._buffer = decoder.cache
        return decoder

    def _check_lengths(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        longest = max(map(len, prompts), default=0)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and longest + max_new_tokens > limit:
            raise ConfigError(
                f"max_new_tokens = {max_new_tokens}: the longest prompt has {longest} tokens and "
                f"the model has {limit} positions; the most that fits is {limit - longest}"
            )


def _projection(head: Head) -> Callable[[Tensor], Tensor]:
    """The output layer. Large ones are not copied for the few rows of a step."""
    if head.weight_VD.numel() > MAX_COPIED:
        return partial(torch.nn.functional.linear, weight=head.weight_VD, bias=head.bias_V)
    return Product(head.weight_VD.detach(), None if head.bias_V is None else head.bias_V.detach())


class Slots:
    """A `Sampling` whose rows stand in slots 0..L-1 of a decoder."""

    def __init__(
        self, sampler: LocalSampler, drawn: Drawn, *, temperature: float, seed: int, top_p: float
    ) -> None:
        self.model, self.head, self.drawn = sampler.model, sampler.head, drawn
        self.temperature, self.top_p = temperature, top_p
        self.project = _projection(self.head)
        num_rows, self.limit = drawn.tokens_BR.shape
        self.num_slots = min(num_rows, max(sampler.max_rows, drawn.group_size))
        self.decoder = sampler.decoder(self.num_slots, drawn.prompts_PT.shape[1] + self.limit)
        self.row_seed_B = row_seeds(num_rows, seed)
        self.next_prompt = 0
        # Of the rows in slots: their number, how much of them is read, how much is drawn.
        self.row_L = torch.empty(0, dtype=torch.int64)
        self.length_L, self.drawn_L = self.row_L, self.row_L
        self.uniform_LR = torch.empty(0, self.limit, dtype=torch.float64)
        self.hidden_LD: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """See `Sampling.__iter__`."""
        was_training = self.model.training
        self.model.eval()
        try:
            while len(self.row_L) or self.waiting:
                ended_E = self._advance()
                if ended_E is not None:
                    yield ended_E
        finally:
            self.model.train(was_training)

    def rollouts(self, row_B: Tensor | None = None) -> Rollouts:
        """See `Sampling.rollouts`."""
        return self.drawn.rollouts(row_B)

    def responses(self, row_B: Tensor) -> list[list[int]]:
        """See `Sampling.responses`."""
        return self.drawn.responses(row_B)

    def num_tokens(self, rows: Sequence[int]) -> int:
        """See `Sampling.num_tokens`."""
        return self.drawn.num_tokens(rows)

    def finished(self, row_B: Tensor) -> Tensor:
        """See `Sampling.finished`."""
        return self.drawn.finished_B[row_B]

    @property
    def waiting(self) -> bool:
        """Whether some prompts have no slot yet."""
        return self.next_prompt < len(self.drawn.prompt_len_P)

    # Not around the loop: whoever takes the rows in between must not compute in this mode.
    @torch.inference_mode()
    def _advance(self) -> Tensor | None:
        """One token for every row in a slot; the rows that ended with it, or None."""
        self._admit()
        assert self.hidden_LD is not None
        weight = self.head.weight_VD
        logits_LV = self.project(self.hidden_LD).float()
        uniform_L = self.uniform_LR.gather(1, self.drawn_L[:, None])[:, 0].to(weight.device)
        logits_LV, kept_LV = masked(logits_LV, self.temperature, self.top_p)
        token_L, logp_L = draw(logits_LV, uniform_L, self.temperature)
        token_L = token_L.cpu()
        ended_L = self.drawn.record(self.row_L, self.drawn_L, token_L, logp_L.cpu(), kept_LV)
        self.drawn_L = self.drawn_L + 1
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
        live, group, drawn = len(self.row_L), self.drawn.group_size, self.drawn
        room = (self.num_slots - live) // group
        enough = room * group * READ_SHARE >= self.num_slots
        if not self.waiting or room == 0 or (live and not enough):
            return
        first = self.next_prompt
        self.next_prompt = min(first + room, len(drawn.prompt_len_P))
        length_P = drawn.prompt_len_P[first : self.next_prompt]
        tokens_PT = drawn.prompts_PT[first : self.next_prompt, : int(length_P.max())]
        device = self.head.weight_VD.device
        hidden_PD = self.decoder.prefill(
            tokens_PT.to(device), length_P.to(device), first=live, copies=group
        )
        row_L = torch.arange(first * group, self.next_prompt * group)
        uniform_LR = uniform(self.row_seed_B[row_L, None], torch.arange(self.limit))
        hidden_LD = hidden_PD.repeat_interleave(group, dim=0)
        self.row_L = torch.cat([self.row_L, row_L])
        self.length_L = torch.cat([self.length_L, length_P.repeat_interleave(group)])
        self.drawn_L = torch.cat([self.drawn_L, torch.zeros_like(row_L)])
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
        source_M, target_M = keep_L[keep_L >= live], ended_L[:live].nonzero()[:, 0]
        if len(source_M):
            device = self.head.weight_VD.device
            self.decoder.move(source_M.to(device), target_M.to(device))
        order_L = torch.arange(live)
        order_L[target_M] = source_M
        self.row_L, self.length_L = self.row_L[order_L], self.length_L[order_L]
        self.drawn_L, self.uniform_LR = self.drawn_L[order_L], self.uniform_LR[order_L]
        if not live:
            self.hidden_LD = None
        return token_L[order_L]
