"""Learning and scoring with one transformers model in this process: the reference backend.

Rows are packed (`packing.py`), and only the positions that predict response tokens reach the output
head. Rollouts stay on the CPU, where packing is planned; a forward pass goes to the device of the
model, and hidden states and losses are there.

Legend: B rows, C bins, T positions, N flat response tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.backends import flat
from posttrain.backends.architecture import backbone, path_of
from posttrain.backends.base import Head, LossFunction, Metrics, MicroBatch, Part
from posttrain.backends.checkpoint import LanguageModel, output_head
from posttrain.backends.flat import is_flat
from posttrain.backends.packing import Packed, flat_passes, forward_passes
from posttrain.backends.precision import computing_copy, give_gradients, take_weights
from posttrain.backends.weights import Average, freeze_others
from posttrain.engine.errors import ConfigError, StageError
from posttrain.losses.kept import kept_logprobs
from posttrain.losses.ops import token_logprobs
from posttrain.rl.kept import flat_index
from posttrain.rl.types import Rollouts

POSITIONS = "max_position_embeddings"
MAX_TOKENS = 2048
"""Tokens of a forward pass: enough for matrix products at full speed, and few enough that what one
layer writes is still in the processor's cache when the next one reads it."""


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """Rows that go through a model at once; of several widths where the model is flat."""

    parts: tuple[Packed, ...]
    flat: bool = False
    """Whether only attention is to see bins."""

    @property
    def index_B(self) -> Tensor:
        """int64, the rows, in the order in which `hidden_states` returns them."""
        return torch.cat([part.index_B for part in self.parts])


def hidden_states(model: Any, forward: ForwardPass, body: Any = None) -> Tensor:
    """`hidden_ND`: last hidden states that predict the response tokens, row after row.

    On the plain path every row has a bin of its own and is padded on the right: causal layers,
    attending or recurrent, never see what comes after a token, and no position ids are needed.
    `body` is a compiled form of the model's backbone.
    """
    parts = [part.to(model.device) for part in forward.parts]
    if forward.flat:
        return flat.hidden_states(model, parts)
    (packed,), inputs = parts, {}
    if path_of(model) == "packed":
        inputs = {"position_ids": packed.position_CT, "attention_mask": packed.mask(model.dtype)}
    body = backbone(model) if body is None else body
    hidden_CTD: Tensor = body(
        input_ids=packed.tokens_CT, use_cache=False, **inputs
    ).last_hidden_state
    return hidden_CTD.flatten(0, 1)[packed.predicts_N]


def passes(
    model: Any,
    rollouts: Rollouts,
    max_tokens: int,
    group_rows: int = 1,
    *,
    compiled: bool = False,
) -> Iterator[ForwardPass]:
    """The forward passes over all rows; every `group_rows` adjacent rows stay together.

    A `compiled` model is called as a whole, so it gets bins.

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
    if packable and not compiled and is_flat(model):
        every = flat_passes(rollouts, max_tokens=max_tokens, hidden_size=size, block=group_rows)
        yield from (ForwardPass(parts=parts, flat=True) for parts in every)
        return
    for part in forward_passes(
        rollouts, max_tokens=max_tokens, hidden_size=size, block=group_rows, pack=packable
    ):
        yield ForwardPass(parts=(part,))


def response_targets(rollouts: Rollouts) -> Tensor:
    """`targets_N`: the response tokens themselves."""
    return rollouts.tokens_BT[rollouts.response_mask_BT()]


def rollout_logprobs(
    hidden_ND: Tensor, head: Head, rollouts: Rollouts, temperature: float
) -> tuple[Tensor, Tensor]:
    """`(logp_N, entropy_N)` of the response tokens from the hidden states that predict them.

    Over the ids that rollouts carry as kept, where they do. All on one device; `logp_N` is
    differentiable, `entropy_N` detached.
    """
    targets_N, kept = response_targets(rollouts), rollouts.kept
    if kept is None:
        return token_logprobs(
            hidden_ND, head.weight_VD, targets_N, bias_V=head.bias_V, temperature=temperature
        )
    return kept_logprobs(
        hidden_ND,
        head.weight_VD,
        targets_N,
        kept.ids_F,
        kept.count_N,
        bias_V=head.bias_V,
        temperature=temperature,
    )


@torch.no_grad()
def response_logprobs(
    hidden_ND: Tensor, head: Head, rollouts: Rollouts, temperature: float
) -> Tensor:
    """`logp_N` of the response tokens from the hidden states that predict them. No gradient.

    On the CPU, as the rollouts are.
    """
    rollouts = rollouts.to(hidden_ND.device)
    logp_N, _ = rollout_logprobs(hidden_ND, head, rollouts, temperature)
    return logp_N.cpu()


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
            flat_N = flat_index(start_B, count_B, forward.index_B)
            hidden_ND[flat_N.to(part.device)] = part
        assert hidden_ND is not None, "no rows to score"
        return hidden_ND


class LocalLearner:
    """A `Learner`: AdamW on one model, gradients summed over micro-batches.

    The model stays in evaluation mode, that is without dropout: a policy that learns must be the
    one that sampled, and there is no random state that a resumed stage would have to find again.
    With a `dtype` other than float32 a copy of the model in that type computes, weights and
    optimiser stay as they are. `compile` compiles the model below its head, for any shape. Only the
    parameters that a glob of `trainable` matches learn. With `ema` the model to keep is the moving
    average of the weights; what computes and samples is the newest.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        max_tokens: int = MAX_TOKENS,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        trainable: Sequence[str] = ("*",),
        ema: float | None = None,
        workers: Executor | None = None,
    ) -> None:
        """`workers` compute the forward passes of an update beside each other. Raises ConfigError
        for a glob of `trainable` that matches no parameter."""
        self.language_model = language_model
        self.master = language_model.model.eval()
        freeze_others(self.master, trainable)
        self.policy = computing_copy(language_model, dtype)
        """What computes, and what a sampler has to sample from."""
        self.model = self.policy.model.eval()
        self.device: torch.device = self.model.device
        self.head: Head = output_head(self.model)
        self.body = torch.compile(backbone(self.model), dynamic=True) if compile else None
        self.max_tokens = max_tokens
        self.max_grad_norm = max_grad_norm
        self.workers = workers
        self.parameters = [p for p in self.master.parameters() if p.requires_grad]
        self.copies = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True
        )
        self.average = None if ema is None else Average(self.parameters, ema)

    def adapt(self, *, weight_decay: float, max_grad_norm: float) -> None:
        """Take these values for the updates that follow, in place of those given at first."""
        self.max_grad_norm = max_grad_norm
        for group in self.optimizer.param_groups:
            group["weight_decay"] = weight_decay

    def update(
        self,
        rollouts: Rollouts,
        loss: LossFunction,
        *,
        count: float,
        lr: float,
        group_rows: int = 1,
        also: Sequence[Part] = (),
    ) -> dict[str, float]:
        """See `Learner.update`."""
        main = Part(name="", rollouts=rollouts, loss=loss, count=count, group_rows=group_rows)
        totals: dict[str, Tensor] = {}

        def run(work: tuple[Part, ForwardPass]) -> tuple[Tensor, Metrics]:
            part, forward = work
            rows = part.rollouts.rows(forward.index_B).to(self.device)
            batch = MicroBatch(index_B=forward.index_B.to(self.device), rollouts=rows)
            hidden_ND = hidden_states(self.model, forward, self.body)
            loss_sum, metrics = part.loss(hidden_ND, self.head, batch)
            if part is main:
                return loss_sum / part.count, metrics
            named = {f"{part.name}/{name}": value for name, value in metrics.items()}
            return loss_sum * (part.weight / part.count), named

        for metrics in self._accumulate(run, self._passes([main, *also])):
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
        take_weights(self.copies, self.parameters)
        if self.average is not None:
            self.average.update()
        return {name: float(value) for name, value in totals.items()} | {"grad_norm": float(norm)}

    def _passes(self, parts: Sequence[Part]) -> Iterator[tuple[Part, ForwardPass]]:
        """The forward passes of every part, one part after the other."""
        compiled = self.body is not None
        for part in parts:
            for forward in passes(
                self.model, part.rollouts, self.max_tokens, part.group_rows, compiled=compiled
            ):
                yield part, forward

    def _accumulate(
        self,
        run: Callable[[tuple[Part, ForwardPass]], tuple[Tensor, Metrics]],
        every: Iterator[tuple[Part, ForwardPass]],
    ) -> Iterator[Metrics]:
        """Add the gradients of all passes to the weights', in their order whoever computes them, so
        that the sums are the same with workers and without; yields the metrics of each."""
        if self.workers is None:
            for work in every:
                loss, metrics = run(work)
                loss.backward()
                give_gradients(self.copies, self.parameters)
                yield metrics
            return

        def gradients(
            work: tuple[Part, ForwardPass],
        ) -> tuple[tuple[Tensor | None, ...], Metrics]:
            loss, metrics = run(work)
            return torch.autograd.grad(loss, self.copies, allow_unused=True), metrics

        for found, metrics in self.workers.map(gradients, every):
            for parameter, gradient in zip(self.parameters, found, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    # As backward() would: a tensor of its own, laid out as the weight is.
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)
                else:
                    parameter.grad += gradient
            yield metrics

    def logprobs(self, rollouts: Rollouts, *, temperature: float) -> Tensor:
        """See `Learner.logprobs`."""
        scorer = LocalScorer(self.policy, max_tokens=self.max_tokens)
        return response_logprobs(scorer.hidden(rollouts), self.head, rollouts, temperature)

    def state(self) -> dict[str, Tensor]:
        """Weights, optimiser moments and moving average by name, for a step checkpoint."""
        tensors = {f"weight.{n}": p.detach() for n, p in self.master.named_parameters()}
        for position, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{position}.{name}"] = value
        return tensors if self.average is None else tensors | self.average.state()

    def result(self) -> LanguageModel:
        """The model to keep: the newest weights, or their moving average with `ema`.

        For the end of a stage: the average takes the place of the weights, also in what computes.
        """
        if self.average is not None:
            self.average.put_in_place()
            take_weights(self.copies, self.parameters)
        return self.language_model

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave; the next update is then bit-identical."""
        with torch.no_grad():
            for name, parameter in self.master.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
        for name, value in tensors.items():
            kind, position, *rest = name.split(".")
            if kind == "optimizer":
                parameter = self.parameters[int(position)]
                self.optimizer.state[parameter][rest[0]] = value.clone().to(parameter.device)
        if self.average is not None:
            self.average.restore(tensors)
        take_weights(self.model.parameters(), self.master.parameters())
