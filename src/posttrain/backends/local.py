"""Learning, sampling and scoring with transformers in this process: the reference backend.

What stands here, in `local_learner.py`, `padded.py` and `lockstep.py` computes any causal model,
plainly: rows are padded on the right, and rows of one length are sampled together. Where a model's
layers allow it, faster ways in `cpu/` compute the same numbers; `fast_paths=False` leaves them out.

Batches stay on the CPU; hidden states and losses are on the device of the model.

Legend: B rows, N sampled tokens (row after row), D hidden size, V vocabulary, K top-k.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.backends import lora
from posttrain.backends.base import Head, HeadSource, Learner, LearnerSettings
from posttrain.backends.budget import MAX_TOKENS, Part, reader_parts, sampler_parts
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel, chat_of, load, output_head
from posttrain.backends.cpu.fused import is_fusable
from posttrain.backends.cpu.slots import Decoders, Slots
from posttrain.backends.forward import hidden_portions, read_hidden, read_logprobs
from posttrain.backends.local_learner import LocalLearner
from posttrain.backends.lockstep import Lockstep
from posttrain.backends.memory import Budget, model_shape, precision_of, rows_at_once
from posttrain.backends.precision import copy_to_compute
from posttrain.backends.resting import RestingWeights
from posttrain.backends.scalar import load_scalar, scores_N
from posttrain.backends.shared import Frozen, SharedModels, own_copy
from posttrain.backends.token_sampling import LocalSampling, SampleBuffer, check_room
from posttrain.losses.distill import teacher_top_k_targets
from posttrain.rl.batch import Batch

MAX_ROWS = 256
"""Rows that are sampled at once."""


class LocalBackend:
    """A `Backend` in this process, on one device."""

    exact = True

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        compile: bool = False,
        workers: Executor | None = None,
        fast_paths: bool = True,
    ) -> None:
        """`compile` compiles the models that learn, `workers` compute their forward passes beside
        each other; see `LocalLearner`."""
        self.device = torch.device(device)
        self.compile, self.workers, self.fast_paths = compile, workers, fast_paths
        self.shared = SharedModels(self._load)
        self.budget = Budget(self.device)
        """What the models of one stage may take together."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """See `Backend.parts`."""
        return self.budget.parts

    def learner(
        self, checkpoint: Path, settings: LearnerSettings, *, scalar: bool = False
    ) -> LocalLearner:
        """See `Backend.learner`."""
        if settings.lora is not None:
            language_model = self.shared.learn(checkpoint, settings.lora, settings.dtype, scalar)
        else:
            whole = settings.master == "float32"
            language_model = self._load(
                checkpoint, torch.float32 if whole else settings.dtype, scalar
            )
        return LocalLearner(
            language_model,
            settings,
            budget=self.budget,
            compile=self.compile,
            workers=self.workers,
            fast_paths=self.fast_paths,
        )

    def sampler(
        self, source: Path | Learner, *, dtype: torch.dtype = torch.float32
    ) -> LocalSampler:
        """See `Backend.sampler`."""
        model = self._load(source, dtype) if isinstance(source, Path) else _local(source)
        return LocalSampler(model, budget=self.budget, fast_paths=self.fast_paths)

    def scorer(
        self, source: Path | Learner, *, dtype: torch.dtype = torch.float32, scalar: bool = False
    ) -> LocalScorer:
        """See `Backend.scorer`."""
        frozen = isinstance(source, Path)
        model = self.shared.read(source, dtype, scalar) if frozen else _local(source)
        return LocalScorer(model, budget=self.budget, fast_paths=self.fast_paths)

    def close(self) -> None:
        """See `Backend.close`. Models here go with the last that holds them."""

    def _load(self, checkpoint: Path, dtype: torch.dtype, scalar: bool = False) -> LanguageModel:
        read = load_scalar if scalar else load
        return read(checkpoint, dtype=dtype, device=self.device)


class LocalScorer:
    """A `Scorer` over a frozen model, or over the one that a learner computes with."""

    def __init__(
        self,
        source: LanguageModel | LocalLearner,
        *,
        checkpoint: Path | None = None,
        max_tokens: int = MAX_TOKENS,
        budget: Budget | None = None,
        fast_paths: bool = True,
    ) -> None:
        """`checkpoint` is where a model of its own was loaded from, for it to rest there. Forward
        passes have `max_tokens` tokens, fewer where `budget` says so, or one longer row."""
        self.learner = source if isinstance(source, LocalLearner) else None
        """Whose weights these are; None for weights of its own."""
        policy = source.policy if isinstance(source, LocalLearner) else source
        self.model = policy.model.eval()
        self.language_model = policy
        self.own_weights: RestingWeights | None = None
        """Weights of its own, which can rest."""
        if policy.below is not None:
            policy.below.readers.add(self)
        elif self.learner is None:
            self.own_weights = RestingWeights(self.model, checkpoint)
        self.chat: Chat = source.chat if isinstance(source, LocalLearner) else chat_of(policy)
        self.budget, self._resting = budget, False
        self._parts: tuple[Part, ...] = ()
        """Its weights and what a pass takes."""
        if budget is not None:
            shape, precision = model_shape(self.model), precision_of(self.model)
            max_tokens = budget.for_reading(shape, precision, max_tokens)
            self._parts = reader_parts(shape, precision=precision, tokens=max_tokens)
            self._tell()
        self.max_tokens, self.fast_paths = max_tokens, fast_paths

    @property
    def head(self) -> Head:
        """See `Scorer.head`."""
        return output_head(self._awake(), self.chat.ids).detached()

    @property
    def _shared(self) -> Frozen | None:
        """The weights of a checkpoint, which others may read too."""
        return None if self.learner is not None else self.language_model.below

    @property
    def weights(self) -> RestingWeights | None:
        """What can rest: weights of its own, or those that it shares; None for a learner's."""
        return self.own_weights if self._shared is None else self._shared.weights

    @property
    def head_at_rest(self) -> HeadSource:
        """See `Scorer.head_at_rest`."""
        shared = self._shared
        weights = self.weights if shared is None or not shared.learns else None
        return self.head if weights is None else weights.head(self.chat.ids)

    @property
    def frozen(self) -> bool:
        """See `Scorer.frozen`."""
        return self.learner is None and not any(p.requires_grad for p in self.model.parameters())

    def rest(self) -> None:
        """See `Scorer.rest`; weights that others read too rest when all of them do."""
        if self._shared is not None:
            self._shared.rest(self)
        elif self.own_weights is not None:
            self.own_weights.rest()
        else:
            return
        if not self._resting:
            self._resting = True
            self._tell()

    def _awake(self) -> Any:
        """The model with its weights in memory."""
        if self._shared is not None:
            self._shared.wake(self)
        elif self.own_weights is not None:
            self.own_weights.wake()
        if self._resting:
            self._resting = False
            self._tell()
        return self.model

    def _tell(self) -> None:
        """Tell the budget what there is: nothing of what rests, and of weights that several read
        each once. Those below an adapter that learns are told by its learner."""
        if self.budget is None:
            return
        weights, *reading = self._parts
        self.budget.take(self, () if self._resting else reading)
        own = self.weights
        if own is not None and not (self._shared is not None and self._shared.learns):
            self.budget.take(own, (weights,) if own.awake else ())

    def will_change(self) -> None:
        """Be awake, with weights that may be written: those of a checkpoint are others' too."""
        self._awake()
        if self._shared is not None:
            self.language_model = own_copy(self.language_model, self)
            self.model = self.language_model.model
            self.own_weights = RestingWeights(self.model, None)
            self._tell()
        elif self.own_weights is not None:
            self.own_weights.will_change()

    def restrict(self, absent: Collection[int]) -> None:
        """See `Scorer.restrict`."""
        self.chat.restrict(absent)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """See `Scorer.hidden`."""
        return read_hidden(
            self._awake(), self.head, batch, max_tokens=self.max_tokens, fast_paths=self.fast_paths
        )

    @torch.no_grad()
    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """See `Scorer.logprobs`."""
        return read_logprobs(
            self._awake(),
            self.head,
            batch,
            temperature,
            max_tokens=self.max_tokens,
            fast_paths=self.fast_paths,
        )

    @torch.no_grad()
    def top_k(self, batch: Batch, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """See `Scorer.top_k`; all ids where the vocabulary has fewer than `k`."""
        head, k = self.head, min(k, len(self.chat.ids))
        parts = [
            teacher_top_k_targets(
                self.hidden(rows), head.weight_VD, k, bias_V=head.bias_V, temperature=temperature
            )
            for rows in hidden_portions(batch, head)
        ]
        ids, logp = zip(*parts, strict=True)
        return torch.cat(ids), torch.cat(logp)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """See `Scorer.scores`."""
        portions = hidden_portions(batch, self.head)
        return torch.cat([scores_N(self.hidden(rows), self.head).cpu() for rows in portions])

    def sync(self, policy: Learner) -> None:
        """See `Scorer.sync`. Raises TypeError and ValueError as `LocalSampler.sync`."""
        if self.learner is None:
            self.will_change()
        _sync(self, policy)

    def state(self) -> dict[str, Tensor]:
        """See `Scorer.state`; an adapter is in the weights."""
        return dict(lora.merged_parameters(self._awake()))

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Scorer.restore`."""
        if tensors:
            self.will_change()
        for name, parameter in self.model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])


class LocalSampler:
    """A `Sampler` over a transformers model, or over the one that a learner computes with."""

    def __init__(
        self,
        source: LanguageModel | LocalLearner,
        *,
        max_rows: int = MAX_ROWS,
        memory: int | None = None,
        budget: Budget | None = None,
        fast_paths: bool = True,
    ) -> None:
        """At most `max_rows` rows are sampled at once, and fewer where their keys and values could
        take more than `memory` bytes, or without a number more than `budget` has for them."""
        self.learner = source if isinstance(source, LocalLearner) else None
        """Whose weights these are; None for weights of its own."""
        policy = source.policy if isinstance(source, LocalLearner) else source
        self.model: Any = policy.model
        self.adapted = lora.has_adapter(self.model)
        """Whether an adapter computes beside the weights: what samples has it in them."""
        self.chat: Chat = source.chat if isinstance(source, LocalLearner) else chat_of(policy)
        self.max_rows, self.fast_paths = max_rows, fast_paths
        self.memory = memory
        self.budget = Budget(self.model.device) if budget is None else budget
        self._take(rows=0, length=0)
        sampled = lora.seen_merged(self.model) if self.adapted else self.model
        self.decoders = Decoders(sampled, read_bytes=self.budget.for_prefill())

    def sync(self, policy: Learner) -> None:
        """See `Sampler.sync`; nothing is to be done where it samples from the learner's own.

        Raises TypeError for a learner of another backend, and ValueError where this samples from
        the weights of another learner, which a copy would destroy.
        """
        _sync(self, policy)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
    ) -> Batch:
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
        return sampling.batch()

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
    ) -> LocalSampling:
        """See `Sampler.stream`. Raises ConfigError if a prompt leaves no room for a response."""
        check_room(prompts, max_new_tokens, self.chat.max_positions)
        head = output_head(self.model, self.chat.ids)
        samples = SampleBuffer(
            prompts,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            pad_id=self.chat.pad_id,
            stop_ids=self.chat.stop_ids,
            num_ids=len(head.weight_VD),
        )
        memory = self.memory
        if memory is None:
            memory = self.budget.for_sampling(model_shape(self.model), precision_of(self.model))
        max_rows = min(self.max_rows, rows_at_once(self.model, samples.width, memory))
        self._take(rows=min(max_rows, len(samples.response_len_B)), length=samples.width)
        how: dict[str, Any] = {
            "temperature": temperature,
            "seed": seed,
            "top_p": top_p,
            "max_rows": max_rows,
        }
        if self.fast_paths and is_fusable(self.model):
            return LocalSampling(samples, Slots(self.decoders, head, samples, **how))
        # Merged once for all tokens of this call, and gone with it.
        model = lora.merged_twin(self.model) if self.adapted else self.model
        return LocalSampling(samples, Lockstep(model, head, samples, **how))

    def _take(self, *, rows: int, length: int) -> None:
        """Tell the budget what so many rows at once take, and the weights where they are own."""
        how = {"precision": precision_of(self.model), "own_weights": self.learner is None}
        parts = sampler_parts(model_shape(self.model), rows=rows, length=length, **how)
        self.budget.take(self, [part for part in parts if part.bytes])


def _local(policy: Learner) -> LocalLearner:
    if not isinstance(policy, LocalLearner):
        raise TypeError(
            f"the local backend reads the weights of local learners; got {type(policy).__name__}"
        )
    return policy


def _sync(reader: LocalSampler | LocalScorer, policy: Learner) -> None:
    """Let the model of `reader` have the present weights of what `policy` computes with."""
    learner = _local(policy)
    if reader.learner is learner:
        return
    if reader.learner is not None:
        raise ValueError(
            f"this {type(reader).__name__} shares the weights of another learner; make one of a "
            "checkpoint, or of the learner to follow"
        )
    if lora.has_adapter(learner.model):
        # One weight at a time, so that no second model stands in memory.
        own = dict(reader.model.named_parameters())
        for name, weight in lora.merged_parameters(learner.model):
            copy_to_compute([own[name]], [weight])
        return
    copy_to_compute(reader.model.parameters(), learner.model.parameters())
