"""The critic of PPO: a model of its own that learns what a state is worth.

A state is a prompt with the response tokens so far. Its value is read where the next token is
predicted, so that a response of n tokens has n values, before its first to before its last token:
what `rl/gae.py` takes. The critic starts from a language model, with values of 0, or from a reward
model, with its rewards (InstructGPT, arXiv 2203.02155, section 3.5), and keeps an optimiser and a
learning rate of its own.

Legend: B rows, N flat response tokens of all rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from posttrain.backends.base import Head, Metrics, MicroBatch
from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.local import LocalLearner, LocalScorer
from posttrain.backends.scalar import load_scalar, scores_N
from posttrain.losses.value import clipped_value, explained_variance
from posttrain.rl.kept import flat_index
from posttrain.rl.types import Rollouts
from posttrain.stages.context import Context
from posttrain.stages.credit import Credit
from posttrain.stages.settings.rl import Rl
from posttrain.stages.teachers import check_same_tokens


class Critic:
    """Values of states, and the updates that bring them nearer to the returns."""

    def __init__(self, learner: LocalLearner) -> None:
        """`learner` holds a model with a score; see `backends/scalar.py`."""
        self.learner = learner

    def values_N(self, rollouts: Rollouts) -> Tensor:
        """The value of the state before each response token, float32, on the CPU. No gradient."""
        scorer = LocalScorer(self.learner.policy, max_tokens=self.learner.max_tokens)
        with torch.no_grad():
            return scores_N(scorer.hidden(rollouts), scorer.head).cpu()

    def update(
        self,
        rollouts: Rollouts,
        return_N: Tensor,
        old_value_N: Tensor,
        *,
        lr: float,
        clip: float | None,
    ) -> dict[str, float]:
        """One optimiser step of `clipped_value` on these rows, a mean over their tokens.

        `return_N` is what `gae` gives, `old_value_N` what `values_N` gave before the first update
        on the batch; `clip` None is the plain squared error. Returns sums over the tokens for
        `value_metrics`, and the gradient norm.
        """
        update = ValueUpdate(rollouts, return_N, old_value_N, clip, self.learner.device)
        return self.learner.update(rollouts, update.loss, count=float(rollouts.num_tokens), lr=lr)

    def state(self) -> dict[str, Tensor]:
        """Weights and optimiser moments, for a step checkpoint."""
        return self.learner.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave; the next update is then bit-identical."""
        self.learner.restore(tensors)


class ValueUpdate:
    """The constants of one step of a critic, which are on `device`."""

    def __init__(
        self,
        rollouts: Rollouts,
        return_N: Tensor,
        old_value_N: Tensor,
        clip: float | None,
        device: torch.device,
    ) -> None:
        self.clip = clip
        self.return_N, self.old_value_N = return_N.to(device), old_value_N.to(device)
        self.length_B = rollouts.response_len_B.to(device)
        self.start_B = self.length_B.cumsum(0) - self.length_B

    def loss(self, hidden_ND: Tensor, head: Head, part: MicroBatch) -> tuple[Tensor, Metrics]:
        """The value loss of the tokens of some rows, a sum over them."""
        flat_N = flat_index(self.start_B, self.length_B, part.index_B)
        value_N = scores_N(hidden_ND, head)
        total, metrics = clipped_value(
            value_N,
            self.old_value_N[flat_N],
            self.return_N[flat_N],
            torch.ones_like(value_N),
            clip=self.clip,
        )
        return total, metrics | {"value_loss": total.detach()}


def value_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a step from what its `Critic.update` calls returned.

    Means over tokens, the gradient norm over updates, and the share of the returns' variance that
    the values explain.
    """
    sums = {name: sum(update[name] for update in updates) for name in updates[0]}
    tokens = sums["value_tokens"]
    means = {name: sums[name] / tokens for name in ("value_loss", "value", "return")}
    return means | {
        "value_clipped": sums["value_clipped"] / tokens,
        "explained_variance": explained_variance(sums),
        "critic_grad_norm": sums["grad_norm"] / len(updates),
    }


def learn_values(
    config: Rl,
    critic: Critic,
    rollouts: Rollouts,
    credits: Credit,
    parts: Sequence[Tensor],
    *,
    lr: float,
) -> dict[str, float]:
    """One update of the critic on each of `parts`, row numbers; returns the step's metrics.

    `lr` is the policy's of this step; the critic's rises and falls with it.
    """
    assert credits.return_N is not None and credits.value_N is not None, "a critic's credit"
    critic_lr = lr if config.critic_lr is None else config.critic_lr * lr / config.lr
    length_B = rollouts.response_len_B
    start_B = length_B.cumsum(0) - length_B
    updates = []
    for rows_B in parts:
        flat_N = flat_index(start_B, length_B, rows_B)
        sums = critic.update(
            rollouts.rows(rows_B),
            credits.return_N[flat_N],
            credits.value_N[flat_N],
            lr=critic_lr,
            clip=config.value_clip,
        )
        updates.append(sums)
    return value_metrics(updates) | {"critic_lr": critic_lr}


def new_critic(config: Rl, start: Path, policy: LanguageModel, ctx: Context) -> Critic:
    """A critic from the language model or the reward model in `start`.

    All of its weights learn, with the optimiser of the stage. Raises ConfigError unless it reads
    the policy's tokens.
    """
    language_model = load_scalar(start, device=ctx.device)
    check_same_tokens(policy, language_model, "critic", role="critic")
    learner = LocalLearner(
        language_model,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        dtype=getattr(torch, config.precision),
        compile=ctx.compile,
        workers=ctx.workers,
    )
    return Critic(learner)
