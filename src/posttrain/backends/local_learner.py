"""Learning with transformers in this process: AdamW on one model, on one device.

Legend: B rows, N sampled tokens (row after row), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.backends import lora
from posttrain.backends.architecture import backbone
from posttrain.backends.base import AuxLoss, HeadLoss, LearnerSettings, Loss, Metrics
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import (
    LanguageModel,
    chat_of,
    has_score,
    output_head,
    save,
    save_adapter,
)
from posttrain.backends.forward import (
    MAX_TOKENS,
    forward_passes,
    read_logprobs,
    sampled_logprobs,
)
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
    optimiser stay as they are. Only the parameters that a glob of `trainable` matches learn; of a
    model with an adapter the adapter. Its weights are held in float32, and what is below it once,
    in the type that computes, shared with whoever reads it. With `ema` the model to keep is the
    moving average of the weights; what computes and samples is the newest.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        settings: LearnerSettings,
        *,
        max_tokens: int = MAX_TOKENS,
        compile: bool = False,
        workers: Executor | None = None,
        fast_paths: bool = True,
    ) -> None:
        """`compile` compiles the model below its head, for any shape; `workers` compute the forward
        passes of an update beside each other. Raises ConfigError for a glob of `trainable` that
        matches no parameter."""
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
        self.max_tokens, self.workers, self.fast_paths = max_tokens, workers, fast_paths
        self.max_grad_norm, self.save_dtype = settings.max_grad_norm, settings.save_dtype
        self.parameters = [p for p in self.master.parameters() if p.requires_grad]
        # In the order of `parameters`; in float32 the very same tensors.
        self.copies = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            # Every step brings its own.
            lr=0.0,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        if language_model.below is not None:
            language_model.below.readers.add(self)
            base = language_model.below.language_model.model.parameters()
            below = {id(parameter) for parameter in base}
            assert not any(p.requires_grad for p in self.model.parameters() if id(p) in below)
            assert not any(id(parameter) in below for parameter in self.parameters)
        self.average = None if settings.ema is None else Average(self.parameters, settings.ema)

    def restrict(self, absent: Collection[int]) -> None:
        """See `Learner.restrict`."""
        self.chat.restrict(absent)

    def set_hyperparameters(self, *, weight_decay: float, max_grad_norm: float) -> None:
        """See `Learner.set_hyperparameters`."""
        self.max_grad_norm = max_grad_norm
        for group in self.optimizer.param_groups:
            group["weight_decay"] = weight_decay

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
                accumulate_to_master(self.copies, self.parameters)
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
            max_tokens=self.max_tokens,
            group_rows=group_rows,
            compiled=self.body is not None,
            fast_paths=self.fast_paths,
        )

    def _loss_arguments(self, part: AuxLoss, forward: ForwardPass) -> tuple[Any, ...]:
        """What the loss function of `part` is called with for the rows of a forward pass."""
        loss, rows = part.loss, part.batch.select(forward.index_B).to(self.device)
        hidden_ND = forward.hidden_states(self.model, self.body)
        head = output_head(self.model, self.chat.ids)
        if isinstance(loss, HeadLoss):
            return loss.settings, hidden_ND, head, rows
        logp_N, entropy_N = sampled_logprobs(hidden_ND, head, rows, loss.temperature)
        return loss.settings, logp_N, entropy_N, rows

    def _gradients(
        self, work: tuple[AuxLoss, ForwardPass]
    ) -> tuple[str, tuple[Tensor | None, ...], Metrics]:
        """The gradients of one forward pass by themselves, for a worker."""
        part, forward = work
        loss_sum, metrics = part.loss.function(*self._loss_arguments(part, forward))
        share = part.share(loss_sum)
        # A loss need not reach every weight: None where it does not.
        return part.name, torch.autograd.grad(share, self.copies, allow_unused=True), metrics

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
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        copy_to_compute(self.copies, self.parameters)
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
            max_tokens=self.max_tokens,
            fast_paths=self.fast_paths,
        )

    def state(self) -> dict[str, Tensor]:
        """See `Learner.state`."""
        tensors = {f"weight.{n}": p.detach() for n, p in self.master.named_parameters()}
        for position, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{position}.{name}"] = value
        return tensors if self.average is None else tensors | self.average.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Learner.restore`; the next update is then bit-identical."""
        with torch.no_grad():
            for name, parameter in self.master.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
        for name, value in tensors.items():
            kind, position, *rest = name.split(".")
            if kind == "optimizer":
                parameter = self.parameters[int(position)]
                # A clone, because AdamW changes it in place.
                self.optimizer.state[parameter][rest[0]] = value.clone().to(parameter.device)
        if self.average is not None:
            self.average.restore(tensors)
        if self.policy.adapter is not None:
            copy_to_compute(self.copies, self.parameters)
            return
        # All parameters, not `copies` alone: frozen ones were put back as well.
        copy_to_compute(self.model.parameters(), self.master.parameters())

    def finish(self) -> None:
        """See `Learner.finish`."""
        if self.average is not None:
            self.average.put_in_place()
            copy_to_compute(self.copies, self.parameters)

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


def _add(sums: Metrics, part: str, metrics: Metrics) -> None:
    for name, value in metrics.items():
        name = f"{part}/{name}" if part else name
        # A function of the user's own may have forgotten to.
        value = value.detach()
        sums[name] = sums[name] + value if name in sums else value
