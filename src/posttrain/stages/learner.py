"""The learner of a stage and the steps that it has to do, as the settings say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

import torch

from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.local import LocalLearner
from posttrain.stages.batches import Batches
from posttrain.stages.context import Context
from posttrain.stages.settings.distill import Distill
from posttrain.stages.settings.imitate import Pretrain, Sft
from posttrain.stages.settings.preference import Dpo, RewardModel
from posttrain.stages.settings.rl import Rl

C = TypeVar("C", Pretrain, Sft, Dpo, RewardModel, Distill)


class Updates(Protocol):
    """The settings of an optimiser that may change over the steps."""

    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...


def adapt(learner: LocalLearner, now: Updates) -> None:
    """Let the updates of a step go by the settings of that step."""
    learner.adapt(weight_decay=now.weight_decay, max_grad_norm=now.max_grad_norm)


def new_learner(
    config: Pretrain | Sft | Dpo | RewardModel | Rl | Distill,
    language_model: LanguageModel,
    ctx: Context,
) -> LocalLearner:
    """AdamW on the trainable weights of `language_model`, on the device and the cores that the
    stage has. Raises ConfigError for a glob of `trainable` that matches no parameter."""
    return LocalLearner(
        language_model,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        dtype=getattr(torch, config.precision),
        compile=ctx.compile,
        trainable=config.trainable,
        ema=config.ema,
        workers=ctx.workers,
    )


def steps_to_do(
    config: C, ctx: Context, learner: LocalLearner, batches: Batches, total: int
) -> Iterator[tuple[int, C]]:
    """The 0-based steps that are left of `total`, with the settings of each.

    Resumes the stage first, at the point at which the first step is asked for.
    """
    first = ctx.resume(learner)
    batches.resume(config, first, total, ctx.history)
    for step in range(first, total):
        now = config.at(step, total, ctx.history)
        adapt(learner, now)
        yield step, now
