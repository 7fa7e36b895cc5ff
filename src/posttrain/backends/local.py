"""Learning and scoring with one transformers model in this process: the reference backend.

Rows are packed (`packing.py`), and only the positions that predict response tokens reach the output
head. Legend: B rows, C bins, T positions, N flat response tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.backends import flat
from posttrain.backends.architecture import backbone, path_of
from posttrain.backends.base import Head, LossFunction, Metrics, MicroBatch
from posttrain.backends.checkpoint import LanguageModel, output_head
from posttrain.backends.flat import is_flat
from posttrain.backends.packing import Packed, flat_passes, forward_passes
from posttrain.engine.errors import ConfigError, StageError
from posttrain.losses.ops import token_logprobs
from posttrain.rl.types import Rollouts

POSITIONS = "max_position_embeddings"
MAX_TOKENS = 2048
"""Tokens of a forward pass: enough for matrix products at full speed, and few enough that what one
layer writes is still in the processor's cache when the next one reads it."""


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """Rows that go through a model at once; of several widths where the model is flat."""

    parts: tuple[Packed, ...]

    @property
    def index_B(self) -> Tensor:
        """int64, the rows, in the order in which `hidden_states` returns them."""
        return torch.cat([part.index_B for part in self.parts])


def hidden_states(model: Any, forward: ForwardPass) -> Tensor:
    """`hidden_ND`: last hidden states that predict the response tokens, row after row.

    On the plain path every row has a bin of its own and is padded on the right: causal layers,
    attending or recurrent, never see what comes after a token, and no position ids are needed.
    """
    if is_flat(model) and path_of(model) == "packed":
        return flat.hidden_states(model, forward.parts)
    (packed,) = forward.parts
    inputs = {}
    if path_of(model) == "packed":
        inputs = {"position_ids": packed.position_CT, "attention_mask": packed.mask(model.dtype)}
    hidden_CTD: Tensor = backbone(model)(
        input_ids=packed.tokens_CT, use_cache=False, **inputs
    ).last_hidden_state
    return hidden_CTD.flatten(0, 1)[packed.predicts_N]


def passes(
    model: Any, rollouts: Rollouts, max_tokens: int, group_rows: int = 1
) -> Iterator[ForwardPass]:
    """The forward passes over all rows; every `group_rows` adjacent rows stay together.

    Raises ConfigError for a row longer than the model has positions.
    """
    longest, limit = rollouts.tokens_BT.shape[1], getattr(model.config, POSITIONS, None)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a row of {longest} tokens, prompt and response, does not fit the {limit} positions "
            "of the model; leave long rows out of the data, or use a model with more positions "
            f"({POSITIONS} in its config.json, max_positions of a pretrain stage)"
        )
    size, packable = model.config.hidden_size, path_of(model) == "packed"
    if packable and is_flat(model):
        every = flat_passes(rollouts, max_tokens=max_tokens, hidden_size=size, block=group_rows)
        yield from (ForwardPass(parts=parts) for parts in every)
        return
    for part in forward_passes(
        rollouts, max_tokens=max_tokens, hidden_size=size, block=group_rows, pack=packable
    ):
        yield ForwardPass(parts=(part,))


def response_targets(rollouts: Rollouts) -> Tensor:
    """`targets_N`: the response tokens themselves."""
    return rollouts.tokens_BT[rollouts.response_mask_BT()]


@torch.no_grad()
def response_logprobs(
    hidden_ND: Tensor, head: Head, rollouts: Rollouts, temperature: float
) -> Tensor:
    """`logp_N` of the response tokens from the hidden states that predict them. No gradient."""
    logp_N, _ = token_logprobs(
        hidden_ND,
        head.weight_VD,
        response_targets(rollouts),
        bias_V=head.bias_V,
        temperature=temperature,
    )
    return logp_N


class LocalScorer:
    """A `Scorer` over a frozen model."""

    def __init__(self, language_model: LanguageModel, *, max_tokens: int = MAX_TOKENS) -> None:
        self.model = language_model.model.eval()
        self.head: Head = output_head(self.model)
        self.max_tokens = max_tokens

    @torch.no_grad()
    def hidden(self, rollouts: Rollouts) -> Tensor:
        """See `Scorer.hidden`."""
        count_B = rollouts.response_len_B
        start_B = count_B.cumsum(0) - count_B
        hidden_ND: Tensor | None = None
        for forward in passes(self.model, rollouts, self.max_tokens):
            part = hidden_states(self.model, forward)
            if hidden_ND is None:
                hidden_ND = part.new_empty(rollouts.num_tokens, part.shape[1])
            hidden_ND[flat_index(start_B, count_B, forward.index_B)] = part
        assert hidden_ND is not None, "no rows to score"
        return hidden_ND


def flat_index(start_B: Tensor, count_B: Tensor, index_B: Tensor) -> Tensor:
    """Where the response tokens of the rows `index_B` stand in a flat `_N` tensor."""
    count = count_B[index_B]
    offset_N = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
    return start_B[index_B].repeat_interleave(count) + offset_N


class LocalLearner:
    """A `Learner`: AdamW on one model, gradients summed over micro-batches.

    The model stays in evaluation mode, that is without dropout: a policy that learns must be the
    one that sampled, and there is no random state that a resumed stage would have to find again.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        max_tokens: int = MAX_TOKENS,
        workers: Executor | None = None,
    ) -> None:
        """`workers` compute the forward passes of an update beside each other."""
        self.language_model = language_model
        self.model = language_model.model.eval()
        self.head: Head = output_head(self.model)
        self.max_tokens = max_tokens
        self.max_grad_norm = max_grad_norm
        self.workers = workers
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True
        )

    def update(
        self,
        rollouts: Rollouts,
        loss: LossFunction,
        *,
        count: float,
        lr: float,
        group_rows: int = 1,
    ) -> dict[str, float]:
        """See `Learner.update`."""
        totals: dict[str, Tensor] = {}

        def run(forward: ForwardPass) -> tuple[Tensor, Metrics]:
            rows = rollouts.rows(forward.index_B)
            part = MicroBatch(index_B=forward.index_B, rollouts=rows)
            loss_sum, metrics = loss(hidden_states(self.model, forward), self.head, part)
            return loss_sum / count, metrics

        every = passes(self.model, rollouts, self.max_tokens, group_rows)
        for metrics in self._accumulate(run, every):
            for name, value in metrics.items():
                totals[name] = totals[name] + value if name in totals else value
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise StageError(
                f"training diverged: the gradient norm is {float(norm)} at lr {lr:g}; lower lr or "
                "max_grad_norm, or lengthen warmup_steps (the run resumes from its last step "
                "checkpoint only with unchanged settings)"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: float(value) for name, value in totals.items()} | {"grad_norm": float(norm)}

    def _accumulate(
        self,
        run: Callable[[ForwardPass], tuple[Tensor, Metrics]],
        every: Iterator[ForwardPass],
    ) -> Iterator[Metrics]:
        """Add the gradients of all passes to the weights', in their order whoever computes them, so
        that the sums are the same with workers and without; yields the metrics of each."""
        if self.workers is None:
            for forward in every:
                loss, metrics = run(forward)
                loss.backward()
                yield metrics
            return

        def gradients(forward: ForwardPass) -> tuple[tuple[Tensor | None, ...], Metrics]:
            loss, metrics = run(forward)
            return torch.autograd.grad(loss, self.parameters, allow_unused=True), metrics

        for found, metrics in self.workers.map(gradients, every):
            for parameter, gradient in zip(self.parameters, found, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad += gradient
            yield metrics

    def logprobs(self, rollouts: Rollouts, *, temperature: float) -> Tensor:
        """See `Learner.logprobs`."""
        scorer = LocalScorer(self.language_model, max_tokens=self.max_tokens)
        return response_logprobs(scorer.hidden(rollouts), self.head, rollouts, temperature)

    def state(self) -> dict[str, Tensor]:
        """Weights and optimiser moments by name, for a step checkpoint."""
        tensors = {f"weight.{n}": p.detach() for n, p in self.model.named_parameters()}
        for position, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{position}.{name}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave; the next update is then bit-identical."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
        for name, value in tensors.items():
            kind, position, *rest = name.split(".")
            if kind == "optimizer":
                self.optimizer.state[self.parameters[int(position)]][rest[0]] = value.clone()
