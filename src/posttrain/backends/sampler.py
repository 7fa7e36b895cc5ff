"""Sampling in slots: a row that ends makes room at once, and waiting prompts take its place.

Each prompt is read once for its whole group. A token is drawn by inverse transform from one
uniform number that depends only on (seed, row, position), so that a row's response does not depend
on which rows happen to run beside it. Log-probs come from the same pass.

Legend: P prompts, B rows, L rows in slots, E rows that have just ended, M rows that move,
T positions, R response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.base import Head
from posttrain.backends.checkpoint import LanguageModel, check_full_attention, output_head
from posttrain.backends.decoder import Decoder, TransformersDecoder
from posttrain.backends.fused import FusedDecoder, is_fusable
from posttrain.engine.errors import ConfigError
from posttrain.rl.types import Rollouts, pad_rows

READ_SHARE = 8
"""Waiting prompts are read when they can have this part of the slots, not whenever one is free: a
forward pass over a few prompts costs nearly as much as one over many."""


class LocalSampler:
    """A `Sampler` over a transformers model in this process."""

    def __init__(self, language_model: LanguageModel, *, max_rows: int = 256) -> None:
        self.model: Any = language_model.model
        self.head: Head = output_head(language_model.model)
        self.device: torch.device = self.head.weight_VD.device
        self.stop_V = torch.zeros(len(self.head.weight_VD), dtype=torch.bool, device=self.device)
        self.stop_V[[i for i in language_model.stop_ids if i < len(self.stop_V)]] = True
        self.pad_id = language_model.pad_id
        self.max_rows = max_rows
        self._buffer: Tensor | None = None
        check_full_attention(self.model.config)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> Rollouts:
        """See `Sampler.sample`. Raises ConfigError if a prompt leaves no room for a response."""
        sampling = self.stream(
            prompts,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
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
    ) -> Sampling:
        """See `Sampler.stream`. Raises ConfigError if a prompt leaves no room for a response."""
        self._check_lengths(prompts, max_new_tokens)
        return Sampling(
            self,
            prompts,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )

    def decoder(self, num_slots: int, num_positions: int) -> Decoder:
        """The fastest decoder that computes this model."""
        shape = {"num_slots": num_slots, "num_positions": num_positions}
        if not is_fusable(self.model):
            return TransformersDecoder(self.model, **shape)
        decoder = FusedDecoder(self.model, **shape, buffer=self._buffer)
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


class Sampling:
    """One call to the sampler while it goes on; see `base.Sampling`."""

    def __init__(
        self,
        sampler: LocalSampler,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        device = sampler.device
        self.model, self.head = sampler.model, sampler.head
        self.stop_V, self.pad_id = sampler.stop_V, sampler.pad_id
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.group_size = group_size
        prompts_PT, prompt_len_P = pad_rows(prompts, sampler.pad_id)
        self.prompts_PT, self.prompt_len_P = prompts_PT.to(device), prompt_len_P.to(device)
        num_rows = len(prompts) * group_size
        self.num_slots = min(num_rows, max(sampler.max_rows, group_size))
        self.next_prompt = 0
        row_B = torch.arange(num_rows, device=device)
        self.row_seed_B = _mix(row_B + _mix(torch.tensor(seed, device=device)))
        self.tokens_BR = torch.full((num_rows, max_new_tokens), sampler.pad_id, device=device)
        self.logp_BR = torch.zeros(num_rows, max_new_tokens, device=device)
        self.response_len_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.finished_B = torch.zeros(num_rows, dtype=torch.bool, device=device)
        # Of the rows in slots: their number, how much of them is read, how much is drawn.
        self.row_L = torch.empty(0, dtype=torch.int64, device=device)
        self.length_L, self.drawn_L = self.row_L, self.row_L
        self.uniform_LR = torch.empty(0, max_new_tokens, dtype=torch.float64, device=device)
        self.hidden_LD: Tensor | None = None
        self.decoder = sampler.decoder(self.num_slots, self.prompts_PT.shape[1] + max_new_tokens)

    def __iter__(self) -> Iterator[Tensor]:
        """See `base.Sampling.__iter__`."""
        was_training = self.model.training
        self.model.eval()
        try:
            while len(self.row_L) or self.waiting:
                ended_E = self._advance()
                if ended_E is not None:
                    yield ended_E
        finally:
            self.model.train(was_training)

    @property
    def waiting(self) -> bool:
        """Whether some prompts have no slot yet."""
        return self.next_prompt < len(self.prompt_len_P)

    # Not around the loop: whoever takes the rows in between must not compute in this mode.
    @torch.inference_mode()
    def _advance(self) -> Tensor | None:
        """One token for every row in a slot; the rows that ended with it, or None."""
        self._admit()
        token_L = self._draw()
        ended_L = self.stop_V[token_L]
        stopped_L = ended_L.clone()
        ended_L |= self.drawn_L == self.max_new_tokens
        ended_E = None
        if bool(ended_L.any()):
            ended_E = self.row_L[ended_L]
            self.response_len_B[ended_E] = self.drawn_L[ended_L]
            self.finished_B[ended_E] = stopped_L[ended_L]
            token_L = self._retire(ended_L, token_L)
        if len(token_L):
            self.hidden_LD = self.decoder.step(token_L, self.length_L)
            self.length_L += 1
        return ended_E

    def _admit(self) -> None:
        """Read waiting prompts into free slots, each prompt once for its whole group."""
        live = len(self.row_L)
        room = (self.num_slots - live) // self.group_size
        enough = room * self.group_size * READ_SHARE >= self.num_slots
        if not self.waiting or room == 0 or (live and not enough):
            return
        first = self.next_prompt
        self.next_prompt = min(first + room, len(self.prompt_len_P))
        length_P = self.prompt_len_P[first : self.next_prompt]
        tokens_PT = self.prompts_PT[first : self.next_prompt, : int(length_P.max())]
        hidden_PD = self.decoder.prefill(tokens_PT, length_P, first=live, copies=self.group_size)
        row_L = torch.arange(
            first * self.group_size, self.next_prompt * self.group_size, device=length_P.device
        )
        position_R = torch.arange(self.max_new_tokens, device=length_P.device)
        uniform_LR = _uniform(self.row_seed_B[row_L, None], position_R)
        hidden_LD = hidden_PD.repeat_interleave(self.group_size, dim=0)
        self.row_L = torch.cat([self.row_L, row_L])
        self.length_L = torch.cat([self.length_L, length_P.repeat_interleave(self.group_size)])
        self.drawn_L = torch.cat([self.drawn_L, torch.zeros_like(row_L)])
        self.uniform_LR = torch.cat([self.uniform_LR, uniform_LR])
        if self.hidden_LD is not None:
            hidden_LD = torch.cat([self.hidden_LD, hidden_LD])
        self.hidden_LD = hidden_LD

    def _draw(self) -> Tensor:
        """The next token of every row, written down with its log-prob."""
        assert self.hidden_LD is not None
        weight, bias = self.head.weight_VD, self.head.bias_V
        logits_LV = torch.nn.functional.linear(self.hidden_LD, weight, bias).float()
        uniform_L = self.uniform_LR.gather(1, self.drawn_L[:, None])[:, 0]
        token_L, logp_L = draw(logits_LV, uniform_L, self.temperature)
        at_L = self.row_L * self.max_new_tokens + self.drawn_L
        self.tokens_BR.view(-1).index_copy_(0, at_L, token_L)
        self.logp_BR.view(-1).index_copy_(0, at_L, logp_L)
        self.drawn_L += 1
        return token_L

    def _retire(self, ended_L: Tensor, token_L: Tensor) -> Tensor:
        """Give up the slots of ended rows: the last rows move into the holes before them.

        Returns the tokens of the rows that go on, in their new order.
        """
        keep_L = (~ended_L).nonzero()[:, 0]
        live = len(keep_L)
        source_M, target_M = keep_L[keep_L >= live], ended_L[:live].nonzero()[:, 0]
        if len(source_M):
            self.decoder.move(source_M, target_M)
        order_L = torch.arange(live, device=ended_L.device)
        order_L[target_M] = source_M
        self.row_L, self.length_L = self.row_L[order_L], self.length_L[order_L]
        self.drawn_L, self.uniform_LR = self.drawn_L[order_L], self.uniform_LR[order_L]
        if not live:
            self.hidden_LD = None
        return token_L[order_L]

    def rollouts(self, row_B: Tensor | None = None) -> Rollouts:
        """See `base.Sampling.rollouts`."""
        if row_B is None:
            row_B = torch.arange(len(self.response_len_B), device=self.tokens_BR.device)
        prompt_B = row_B // self.group_size
        prompt_len_B, response_len_B = self.prompt_len_P[prompt_B], self.response_len_B[row_B]
        num_rows, columns = len(row_B), self.prompts_PT.shape[1]
        longest = int(response_len_B.max()) if num_rows else 0
        used = int((prompt_len_B + response_len_B).max()) if num_rows else 0
        tokens_BT = torch.full(
            (num_rows, columns + longest), self.pad_id, device=self.tokens_BR.device
        )
        tokens_BT[:, :columns] = self.prompts_PT[prompt_B]
        position_R = torch.arange(longest, device=tokens_BT.device)
        valid_BR = position_R < response_len_B[:, None]
        at_BR = prompt_len_B[:, None] + position_R
        response_BR = torch.where(valid_BR, self.tokens_BR[row_B, :longest], self.pad_id)
        tokens_BT.scatter_(1, at_BR, response_BR)
        return Rollouts(
            tokens_BT=tokens_BT[:, :used].clone(),
            prompt_len_B=prompt_len_B,
            response_len_B=response_len_B,
            logp_BR=self.logp_BR[row_B, :longest] * valid_BR,
            finished_B=self.finished_B[row_B],
        )


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob: inverse transform, or the arg max at temperature 0.

    Draws the first token whose cumulative probability passes the row's uniform number. The
    cumulative sum is in float64: in float32 its end can stop short of 1 on a large vocabulary.
    """
    if temperature == 0:
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        token_B = logits_BV.argmax(dim=-1)
    else:
        if temperature != 1:
            logits_BV = logits_BV / temperature
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        cumulative_BV = logp_BV.double().exp_().cumsum_(dim=-1)
        target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
        token_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
        token_B = token_B.clamp_(max=logits_BV.shape[1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None])[:, 0]


def _mix(value: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 (multiplication wraps): spreads nearby integers apart."""
    value = value + -7046029254386353131
    value = (value ^ _shift(value, 30)) * -4658895280553007687
    value = (value ^ _shift(value, 27)) * -7723592293110705685
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's `>>` on int64 keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _uniform(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """float64 in [0, 1) from (row seed, position)."""
    return _shift(_mix(seed_B ^ _mix(position_B)), 11).double() * 2.0**-53
