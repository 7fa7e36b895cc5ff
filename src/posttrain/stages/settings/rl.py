"""Settings of reinforcement learning."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.stages.settings.base import (
    Aggregation,
    Config,
    Correction,
    InModes,
    Optimizer,
    Positive,
    Rollout,
    refuse_unread,
)


class Rl(Config, Optimizer, InModes, Rollout, Correction, Aggregation):
    """GRPO and its relatives on verifiable rewards: `r.rl(start=..., prompts=...)`."""

    steps: int = Positive
    prompts_per_step: int = Field(32, gt=0)
    group_size: int = Field(8, gt=1)
    """Responses per prompt."""
    advantage: Literal["group_mean", "group_zscore", "leave_one_out", "batch"] = "group_zscore"
    ratio: Literal["token", "sequence"] = "token"
    """`sequence` is GSPO's geometric mean over the response."""
    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.2, gt=0)
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the stage's start; 0 loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    drop_zero_variance: bool = True
    """Leave out groups whose rewards are all alike: they carry no gradient. With a KL penalty in
    the loss they do, and stay."""

    @model_validator(mode="after")
    def _ratio_is_read(self) -> Self:
        if self.updates_per_batch == 1:
            because = "updates_per_batch = 1 (the ratio is then exactly 1)"
            refuse_unread(self, "clip_low", "clip_high", because=because)
            if self.correction == "none":
                refuse_unread(self, "ratio", because=because)
        return self

    @model_validator(mode="after")
    def _kl_is_read(self) -> Self:
        if self.kl_coef == 0:
            refuse_unread(self, "kl_estimator", "kl_in", because="kl_coef = 0")
        return self

    @model_validator(mode="after")
    def _k1_is_a_reward(self) -> Self:
        if self.kl_coef > 0 and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator = k1 with kl_in = loss: the gradient of log(p/q) of a sampled token "
                "is zero in expectation, so this would regularise nothing; use kl_in = reward, or "
                "k2 or k3"
            )
        return self
