"""Sampling with a slot cache: finished rows make room, and waiting prompts take their place.

Each prompt is prefilled once for its whole group. A token is drawn by inverse transform from one
uniform number that depends only on (seed, row, position), so that a row's response does not depend
on which rows happen to run beside it. Log-probs come from the same pass.

Legend: P prompts, B rows, T positions, R response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from posttrain.backends.architecture import path_of
from posttrain.backends.base import Head
from posttrain.backends.cache import SlotCache
from posttrain.backends.checkpoint import LanguageModel, output_head
from posttrain.backends.drawing import draw, row_seeds, uniform
from posttrain.backends.lockstep import Lockstep
from posttrain.engine.errors import ConfigError
from posttrain.rl.types import Rollouts, pad_rows

# Rows move together when less than this share of them goes on, or when waiting prompts could have
# an eighth of the slots; not whenever one ends, because moving copies the whole cache.
COMPACT_BELOW = 0.75


class LocalSampler:
    """A `Sampler` over a transformers model in this process."""

    def __init__(self, language_model: LanguageModel, *, max_rows: int = 256) -> None:
        self.model: Any = language_model.model
        self.head: Head = output_head(language_model.model)
        self.stop_ids = torch.tensor(language_model.stop_ids)
        self.pad_id = language_model.pad_id
        self.max_rows = max_rows

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
        self._check_lengths(prompts, max_new_tokens)
        if path_of(self.model) == "plain":
            lockstep = Lockstep(
                self.model,
                self.head,
                prompts,
                stop_ids=self.stop_ids,
                pad_id=self.pad_id,
                group_size=group_size,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                max_rows=self.max_rows,
            )
            for _ in lockstep:
                pass
            return lockstep.rollouts()
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            run = _Run(self, prompts, group_size, max_new_tokens, temperature, seed)
            while run.live or run.waiting:
                run.admit()
                run.step()
                run.retire()
        self.model.train(was_training)
        # Outside inference mode, so that the result may take part in a gradient.
        return run.rollouts()

    def _check_lengths(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        longest = max(map(len, prompts), default=0)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and longest + max_new_tokens > limit:
            raise ConfigError(
                f"max_new_tokens = {max_new_tokens}: the longest prompt has {longest} tokens and "
                f"the model has {limit} positions; the most that fits is {limit - longest}"
            )


class _Run:
    """The state of one call to `sample`."""

    def __init__(
        self,
        sampler: LocalSampler,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        self.model, self.head = sampler.model, sampler.head
        self.stop_ids, self.pad_id = sampler.stop_ids, sampler.pad_id
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.prompts_PT, self.prompt_len_P = pad_rows(prompts, sampler.pad_id)
        self.group_size = group_size
        num_rows = len(prompts) * group_size
        self.num_slots = min(num_rows, max(sampler.max_rows, group_size))
        columns = self.prompts_PT.shape[1] + max_new_tokens
        layers = self.model.config.num_hidden_layers
        self.cache = SlotCache(layers, self.num_slots, columns)
        self.next_prompt = 0
        self.row_seed_B = row_seeds(num_rows, seed)
        self.tokens_BR = torch.full((num_rows, max_new_tokens), sampler.pad_id)
        self.logp_BR = torch.zeros(num_rows, max_new_tokens)
        self.response_len_B = torch.zeros(num_rows, dtype=torch.int64)
        self.finished_B = torch.zeros(num_rows, dtype=torch.bool)
        # Of the rows now in slots: their number, tokens in the cache, tokens sampled, next logits.
        self.row_L = torch.empty(0, dtype=torch.int64)
        self.cached_L = torch.empty(0, dtype=torch.int64)
        self.sampled_L = torch.empty(0, dtype=torch.int64)
        self.done_L = torch.empty(0, dtype=torch.bool)
        self.hidden_LD: Tensor | None = None

    @property
    def live(self) -> int:
        return len(self.row_L)

    @property
    def waiting(self) -> bool:
        return self.next_prompt < len(self.prompt_len_P)

    def admit(self) -> None:
        """Prefill waiting prompts into free slots, one prefill per prompt for its whole group."""
        room = (self.num_slots - self.live) // self.group_size
        if not self.waiting or room == 0:
            return
        index_P = torch.arange(
            self.next_prompt, min(self.next_prompt + room, len(self.prompt_len_P))
        )
        self.next_prompt += len(index_P)
        length_P = self.prompt_len_P[index_P]
        tokens_PT = self.prompts_PT[index_P, : int(length_P.max())]
        prefilled = DynamicCache()
        hidden_PTD = self.model.base_model(
            input_ids=tokens_PT, past_key_values=prefilled, use_cache=True
        ).last_hidden_state
        hidden_PD = hidden_PTD[torch.arange(len(index_P)), length_P - 1]
        copy_L = torch.arange(len(index_P)).repeat_interleave(self.group_size)
        slot_L = torch.arange(self.live, self.live + len(copy_L))
        self.cache.fill(slot_L, prefilled, copy_L)
        member_L = torch.arange(self.group_size).repeat(len(index_P))
        row_L = index_P[copy_L] * self.group_size + member_L
        self.row_L = torch.cat([self.row_L, row_L])
        self.cached_L = torch.cat([self.cached_L, length_P[copy_L]])
        self.sampled_L = torch.cat([self.sampled_L, torch.zeros_like(row_L)])
        self.done_L = torch.cat([self.done_L, torch.zeros_like(row_L, dtype=torch.bool)])
        fresh_LD = hidden_PD[copy_L]
        old = self.hidden_LD
        self.hidden_LD = fresh_LD if old is None else torch.cat([old, fresh_LD])

    def step(self) -> None:
        """Draw one token for every live row, and run those that go on through the model."""
        assert self.hidden_LD is not None
        weight, bias = self.head.weight_VD, self.head.bias_V
        logits_LV = torch.nn.functional.linear(self.hidden_LD, weight, bias).float()
        uniform_L = uniform(self.row_seed_B[self.row_L], self.sampled_L)
        token_L, logp_L = draw(logits_LV, uniform_L, self.temperature)
        write = ~self.done_L
        row, at = self.row_L[write], self.sampled_L[write]
        self.tokens_BR[row, at] = token_L[write]
        self.logp_BR[row, at] = logp_L[write]
        self.sampled_L += 1
        stopped_L = torch.isin(token_L, self.stop_ids) & write
        self.finished_B[self.row_L[stopped_L]] = True
        ended_L = write & (stopped_L | (self.sampled_L >= self.max_new_tokens))
        self.response_len_B[self.row_L[ended_L]] = self.sampled_L[ended_L]
        self.done_L |= ended_L
        if bool(self.done_L.all()):
            return
        # Rows that ended but still hold a slot run along without effect; their position stands.
        mask = self.cache.aim(self.cached_L)
        self.hidden_LD = self.model.base_model(
            input_ids=token_L[:, None],
            position_ids=self.cached_L[:, None],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, 0]
        self.cached_L = self.cached_L + (~self.done_L).long()

    def retire(self) -> None:
        """Give up the slots of ended rows when enough of them have ended or others wait."""
        ended = int(self.done_L.sum())
        due = ended == self.live or ended > (1 - COMPACT_BELOW) * self.live
        wanted = self.waiting and self.num_slots - self.live + ended >= self.group_size
        if ended == 0 or not (due or (wanted and ended * 8 >= self.num_slots)):
            return
        keep_L = (~self.done_L).nonzero()[:, 0]
        self.cache.keep(keep_L)
        assert self.hidden_LD is not None
        self.hidden_LD = self.hidden_LD[keep_L]
        self.row_L, self.cached_L = self.row_L[keep_L], self.cached_L[keep_L]
        self.sampled_L, self.done_L = self.sampled_L[keep_L], self.done_L[keep_L]

    def rollouts(self) -> Rollouts:
        """Everything sampled, as one right-padded batch."""
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
