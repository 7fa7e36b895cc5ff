"""The critic of PPO: a model of its own that learns what a state is worth.

A state is a prompt with the response tokens so far. Its value is read where the next token is
predicted, so that a response of n tokens has n values, before its first to before its last token:
what `rl/gae.py` takes. The critic starts from a language model, with values of 0, or from a reward
model, with its rewards (InstructGPT, arXiv 2203.02155, section 3.5), and keeps an optimiser and a
learning rate of its own.

Legend: B rows, N sampled tokens of all rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Event

import torch
from torch import Tensor

from posttrain.algorithms import Gae
from posttrain.backends.base import Head, HeadLoss, Learner, Metrics, Scorer
from posttrain.backends.scalar import scores_N
from posttrain.backends.vocabulary import check_same_tokens, draw_alike
from posttrain.losses.value import clipped_value, explained_variance
from posttrain.rl.batch import Batch, Minibatch
from posttrain.stages.context import Context
from posttrain.stages.settings.rl import Rl


class Critic:
    """Values of states, and the updates that bring them nearer to the returns."""

    def __init__(
        self, settings: Rl, ctx: Context, policy: Learner, reference: Scorer | None = None
    ) -> None:
        """From the edge `critic` if there is one, else from the start of the stage. All its weights
        learn, with the optimiser of the stage. From now on the policy says only tokens that the
        critic has, and its `reference` gives probability to no others. Raises ConfigError for a
        critic whose tokens are not the policy's."""
        source = "critic" if "critic" in ctx.inputs else "start"
        self.learner = ctx.learner(settings, source, scalar=True, whole=True)
        check_same_tokens(policy.chat, self.learner.chat, "critic", role="critic")
        draw_alike(policy, [self.learner] if reference is None else [self.learner, reference])
        # It reads the weights that the learner has at the time of each call.
        self.scorer = ctx.scorer(self.learner, precision=settings.precision, scalar=True)

    def values(self, batch: Batch) -> Tensor:
        """`value_N` of the state before each sampled token, float32, on the CPU. No gradient."""
        return self.scorer.scores(batch)

    def update(self, s: Rl, minibatches: Sequence[Minibatch], *, lr: float) -> dict[str, float]:
        """One optimiser step of `value_loss` on each minibatch, over the tokens that it counts.

        Their rows have `return_N`, what `gae` gives, and `old_value_N`, what `values` gave before
        the first update. `lr` is the policy's of this step; the critic's rises and falls with it.
        Returns the step's metrics.
        """
        assert isinstance(s.advantage, Gae), "only generalised advantage estimation has a critic"
        peak = s.advantage.critic_lr
        critic_lr = lr if peak is None else peak * lr / s.lr
        loss = HeadLoss(value_loss, s.advantage.value_clip)
        updates = [
            self.learner.update(part.rows, loss, count=float(part.num_tokens), lr=critic_lr)
            for part in minibatches
        ]
        return value_metrics(updates) | {"critic_lr": critic_lr}

    def set_hyperparameters(self, *, weight_decay: float, max_grad_norm: float) -> None:
        """Take these values for the updates that follow."""
        self.learner.set_hyperparameters(weight_decay=weight_decay, max_grad_norm=max_grad_norm)

    def state(self) -> dict[str, Tensor]:
        """Weights and optimiser moments, for a step checkpoint."""
        return self.learner.state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave; the next update is then bit-identical."""
        self.learner.restore(tensors)

    def hold(self, read: Event) -> None:
        """Wait for this event before changing what `state` gave."""
        self.learner.hold(read)


def value_loss(
    clip: float | None, hidden_ND: Tensor, head: Head, batch: Batch
) -> tuple[Tensor, Metrics]:
    """The value loss of the tokens of some rows, a sum over them. A `HeadLoss`."""
    value_N = scores_N(hidden_ND, head)
    total, metrics = clipped_value(
        value_N, batch["old_value_N"], batch["return_N"], torch.ones_like(value_N), clip=clip
    )
    return total, metrics | {"value_loss": total.detach()}


def value_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a step from the sums of its updates.

    Means over tokens, the gradient norm over updates, and the share of the returns' variance that
    the values explain.
    """
    sums = {name: sum(update[name] for update in updates) for name in updates[0]}
    tokens = sums["value_tokens"]
    means = {name: sums[name] / tokens for name in ("value_loss", "value", "return")}
    return means | {
        "value_clipped": sums["value_clipped"] / tokens,
        # From the summed moments: the shares of single updates have no meaningful mean.
        "explained_variance": explained_variance(sums),
        "critic_grad_norm": sums["grad_norm"] / len(updates),
    }
