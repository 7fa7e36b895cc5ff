"""Learning with transformers in this process: AdamW on one model, on one device.

Legend: B rows, N sampled tokens (row after row), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from posttrain.backends import lora
from posttrain.backends.architecture import backbone
from posttrain.backends.base import AuxLoss, HeadLoss, LearnerSettings, Loss, Metrics
from posttrain.backends.budget import MAX_TOKENS, Part, PassPlan, learner_parts
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import (
    LanguageModel,
    chat_of,
    has_score,
    output_head,
    save,
    save_adapter,
)
from posttrain.backends.forward import forward_passes, read_logprobs, sampled_logprobs
from posttrain.backends.memory import Budget, model_shape, precision_of
from posttrain.backends.optimizer import make_optimizer
from posttrain.backends.padded import ForwardPass
from posttrain.backends.precision import accumulate_to_master, computing_copy, copy_to_compute
from posttrain.backends.scalar import save_scalar
from posttrain.backends.weights import Average, freeze_others
from posttrain.engine.errors import StageError
from posttrain.rl.batch import Batch


class LocalLearner:
    """A `Learner`: AdamW on one model, gradients summed over forward passes.

    The model stays in evaluation mode, that is without dropout: a policy that learns must be the
    one that sampled, and there is no random state that a resumed stage would have to find again.
    With a `dtype` other than float32 a copy of the model in that type computes, weights and
    optimiser stay as they are; with a `stochastic` master there is only that copy
    (`optimizer.py`). Only the parameters that a glob of `trainable` matches learn; of a model with
    an adapter the adapter. Its weights are held in float32, and what is below it once, in the type
    that computes, shared with whoever reads it. With `ema` the model to keep is the moving average
    of the weights; what computes and samples is the newest.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        settings: LearnerSettings,
        *,
        max_tokens: int = MAX_TOKENS,
        kept_tokens: int | None = None,
        budget: Budget | None = None,
        compile: bool = False,
        workers: Executor | None = None,
        fast_paths: bool = True,
    ) -> None:
        """Forward passes have `max_tokens` tokens, or one longer row; those of more than
        `kept_tokens` are computed with gradient checkpointing, without a number none is. With a
        `budget` both follow from the memory that there is for the first of them. `compile` compiles
        the model below its head, for any shape; `workers` compute the forward passes of an update
        beside each other.

        Raises ConfigError for a glob of `trainable` that matches no parameter, and where the
        optimiser lacks its library.
        """
        self.language_model = language_model
        self.chat: Chat = chat_of(language_model)
        adapter = language_model.adapter
        if adapter is None:
            self.master: Any = language_model.model.eval()
            freeze_others(self.master, settings.trainable)
            self.policy = computing_copy(language_model, settings.dtype)
            """What computes: the model itself, or a copy of it in another type."""
        else:
            self.master = lora.Masters(language_model.model, settings.dtype)
            self.policy = language_model
        self.model = self.policy.model.eval()
        self.device: torch.device = self.model.device
        self.body = torch.compile(backbone(self.model), dynamic=True) if compile else None
        self._max_tokens, self._kept_tokens, self.budget = max_tokens, kept_tokens, budget
        self.workers, self.fast_paths = workers, fast_paths
        self.settings = settings
        self.max_grad_norm, self.save_dtype = settings.max_grad_norm, settings.save_dtype
        self.weights = [p for p in self.master.parameters() if p.requires_grad]
        # In the order of `weights`; where these compute themselves the very same tensors.
        self.copies = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.weights, settings)
        self.parameters = self.optimizer.parameters
        """In whose `grad` the gradients are added up, in float32."""
        for mine, theirs in zip(self.copies, self.parameters, strict=True):
            if mine is not theirs:
                mine.register_post_accumulate_grad_hook(partial(_hand_on, theirs))
        self.read: Event | None = None
        """Set when a step checkpoint of what is there now was written; see `hold`."""
        self._read_tokens = max_tokens
        if budget is not None:
            budget.take(self, self._parts(PassPlan(max_tokens=max_tokens)))
            shape, precision = model_shape(self.model), precision_of(self.model)
            self._read_tokens = budget.for_reading(shape, precision, max_tokens)
        self.average = None if settings.ema is None else Average(self.weights, settings.ema)
        if language_model.below is not None:
            language_model.below.check_frozen(self.model, self.weights)
            language_model.below.readers.add(self)
            language_model.below.learns = True
            if budget is not None:
                # Who read them before has told of them, and they are among the learner's parts.
                budget.take(language_model.below.weights, ())

    @cached_property
    def passes(self) -> PassPlan:
        """How it goes through a batch. Asked for when the models of the stage are there."""
        if self.budget is None:
            return PassPlan(max_tokens=self._max_tokens, kept_tokens=self._kept_tokens)
        shape, precision = model_shape(self.model), precision_of(self.model)
        plan = self.budget.for_learning(shape, precision, self._max_tokens)
        self.budget.take(self, self._parts(plan))
        return plan

    def _parts(self, plan: PassPlan) -> tuple[Part, ...]:
        return learner_parts(
            model_shape(self.model),
            precision=precision_of(self.model),
            master=self.settings.master,
            adapter=self.policy.adapter is not None,
            states=self.settings.states,
            ema=self.settings.ema is not None,
            trained=sum(weight.numel() for weight in self.weights),
            tokens=plan.max_tokens,
            checkpointing=plan.checkpoints(plan.max_tokens),
        )

    def restrict(self, absent: Collection[int]) -> None:
        """See `Learner.restrict`."""
        self.chat.restrict(absent)

    def set_hyperparameters(self, *, weight_decay: float, max_grad_norm: float) -> None:
        """See `Learner.set_hyperparameters`."""
        self.max_grad_norm = max_grad_norm
        self.optimizer.set_weight_decay(weight_decay)

    def update(
        self,
        batch: Batch,
        loss: Loss,
        *,
        count: float,
        lr: float,
        group_rows: int = 1,
        aux: Sequence[AuxLoss] = (),
    ) -> dict[str, float]:
        """See `Learner.update`: `accumulate`, then `step`."""
        sums = self.accumulate(batch, loss, count=count, group_rows=group_rows, aux=aux)
        norm = self.step(lr)
        return {name: float(value) for name, value in sums.items()} | {"grad_norm": norm}

    def accumulate(
        self,
        batch: Batch,
        loss: Loss,
        *,
        count: float,
        group_rows: int = 1,
        aux: Sequence[AuxLoss] = (),
    ) -> Metrics:
        """Add the gradients of `sum(loss) / count` and of the losses in `aux` to the `grad` of
        `parameters`; returns the metric sums.

        Learners that share a step are each given some of the rows, and the counts of all.
        """
        main = AuxLoss(name="", batch=batch, loss=loss, count=count, group_rows=group_rows)
        work = (
            (part, forward)
            for part in (main, *aux)
            for forward in self._forward_passes(part.batch, part.group_rows)
        )
        sums: Metrics = {}
        if self.workers is None:
            for part, forward in work:
                # Called from here, so that a traceback leads from the stage straight to its loss.
                loss_sum, metrics = part.loss.function(*self._loss_arguments(part, forward))
                part.share(loss_sum).backward()
                _add(sums, part.name, metrics)
        else:
            # In their order whoever computes them, so that the sums are the same with workers and
            # without.
            for name, gradients, metrics in self.workers.map(self._gradients, work):
                self._accumulate(gradients)
                _add(sums, name, metrics)
        return sums

    def _forward_passes(self, batch: Batch, group_rows: int) -> Iterator[ForwardPass]:
        return forward_passes(
            self.model,
            batch,
            max_tokens=self.passes.max_tokens,
            group_rows=group_rows,
            compiled=self.body is not None,
            fast_paths=self.fast_paths,
        )

    def _loss_arguments(self, part: AuxLoss, forward: ForwardPass) -> tuple[Any, ...]:
        """What the loss function of `part` is called with for the rows of a forward pass."""
        loss, rows = part.loss, part.batch.select(forward.index_B).to(self.device)
        hidden_ND = forward.hidden_states(
            self.model, self.body, checkpointing=self._checkpoints(forward)
        )
        head = output_head(self.model, self.chat.ids)
        if isinstance(loss, HeadLoss):
            return loss.settings, hidden_ND, head, rows
        logp_N, entropy_N = sampled_logprobs(hidden_ND, head, rows, loss.temperature)
        return loss.settings, logp_N, entropy_N, rows

    def _checkpoints(self, forward: ForwardPass) -> bool:
        """Whether there is no memory for all that the layers of this pass would keep. Models that
        are computed beside each other are too small for the question."""
        return self.workers is None and self.passes.checkpoints(forward.num_positions)

    def _gradients(
        self, work: tuple[AuxLoss, ForwardPass]
    ) -> tuple[str, tuple[Tensor | None, ...], Metrics]:
        """The gradients of one forward pass by themselves, for a worker."""
        part, forward = work
        loss_sum, metrics = part.loss.function(*self._loss_arguments(part, forward))
        share = part.share(loss_sum)
        # A loss need not reach every weight: None where it does not.
        return part.name, torch.autograd.grad(share, self.copies, allow_unused=True), metrics

    def _wait(self) -> None:
        """Until nobody reads any more what is about to change."""
        if self.read is not None:
            self.read.wait()
            self.read = None

    def _accumulate(self, gradients: tuple[Tensor | None, ...]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                # As backward() would: a tensor of its own, laid out as the weight is.
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            else:
                parameter.grad += gradient

    def step(self, lr: float) -> float:
        """Clip the gradients that were added up, let AdamW step, and hand the new weights on;
        returns the norm before clipping.

        Raises StageError where that is not finite, before anything has changed.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise StageError(
                f"training diverged: the gradient norm is {float(norm)} at lr {lr:g}; lower lr or "
                "max_grad_norm, or lengthen warmup_steps. With other settings the stage begins "
                "anew; to go on from its last step checkpoint instead, start a stage from "
                'r.model("NAME@step"), or split it: r.extend(stage, steps=..., lr=...) goes on '
                "from a finished one"
            )
        self._wait()
        self.optimizer.step(lr)
        copy_to_compute(self.copies, self.weights)
        if self.average is not None:
            self.average.update()
        return float(norm)

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """See `Learner.logprobs`."""
        return read_logprobs(
            self.model,
            output_head(self.model, self.chat.ids).detached(),
            batch,
            temperature,
            max_tokens=self._read_tokens,
            fast_paths=self.fast_paths,
        )

    def state(self) -> dict[str, Tensor]:
        """See `Learner.state`."""
        tensors = {f"weight.{n}": p.detach() for n, p in self.master.named_parameters()}
        tensors |= self.optimizer.state()
        return tensors if self.average is None else tensors | self.average.state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Learner.restore`; the next update is then bit-identical."""
        self._wait()
        with torch.no_grad():
            for name, parameter in self.master.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
        self.optimizer.restore(tensors)
        if self.average is not None:
            self.average.restore(tensors)
        if self.policy.adapter is not None:
            copy_to_compute(self.copies, self.weights)
            return
        # All parameters, not `copies` alone: frozen ones were put back as well.
        copy_to_compute(self.model.parameters(), self.master.parameters())

    def hold(self, read: Event) -> None:
        """See `Learner.hold`."""
        self.read = read

    def finish(self) -> None:
        """See `Learner.finish`."""
        self._wait()
        self.optimizer.release()
        if self.average is not None:
            self.average.put_in_place()
            copy_to_compute(self.copies, self.weights)

    def save(self, out: Path) -> None:
        """See `Learner.save`."""
        types = self.language_model.types if self.save_dtype == "base" else self.save_dtype
        if self.policy.adapter is not None:
            own = {lora.master_name(name): p for name, p in self.master.named_parameters()}
            save_adapter(self.language_model, own, out, types=types)
            return
        write = save_scalar if has_score(self.master) else save
        write(self.language_model, out, types=types)

    def num_parameters(self) -> int:
        """See `Learner.num_parameters`."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def _hand_on(master: Tensor, mine: Tensor) -> None:
    """Add a gradient to that of the master as soon as it is whole, so that there are never those of
    all weights twice."""
    accumulate_to_master([mine], [master])


def _add(sums: Metrics, part: str, metrics: Metrics) -> None:
    for name, value in metrics.items():
        name = f"{part}/{name}" if part else name
        # A function of the user's own may have forgotten to.
        value = value.detach()
        sums[name] = sums[name] + value if name in sums else value
