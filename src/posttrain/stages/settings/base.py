"""What the settings of several kinds have in common: optimiser, shares, sampling, averaging.

Kept apart from the stage loops so that planning a run imports neither torch nor transformers. A
setting is part of a stage's identity: change it and the stage runs again. Paths, threads and
devices are therefore not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.modes import Mode
from posttrain.stages.settings.scheduled import refuse_unread

Positive = Field(gt=0)
Weight = Annotated[float, Field(ge=0)]


def one_length(config: Lengths, size: str = "batch_size") -> None:
    """Raise ValueError unless a stage has exactly one of its two lengths.

    It cannot be a number of passes where the number of rows per step, `size`, has a schedule.
    """
    if (config.steps is None) == (config.epochs is None):
        raise ValueError("give exactly one of steps and epochs")
    if config.epochs is not None and size in config.schedules:
        raise ValueError(
            f"epochs = {config.epochs:g} with a schedule of {size}: the steps of a pass are not "
            "known before; give steps instead"
        )


class Lengths(Protocol):
    """A stage whose length is given in steps or in passes over its data."""

    @property
    def steps(self) -> int | None: ...
    @property
    def epochs(self) -> float | None: ...
    @property
    def schedules(self) -> Mapping[str, Any]: ...


class Optimizer(BaseModel):
    """AdamW and its learning-rate schedule; mixed into the stages that train."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset({"lr", "weight_decay", "max_grad_norm"})

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after warm-up; linear and cosine fall to `lr_end`."""
    lr_end: float = Field(0.05, ge=0, le=1)
    """Last learning rate as a share of `lr`."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear rise from 0 to `lr`; at most half of the stage."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    trainable: list[str] = Field(default_factory=lambda: ["*"], min_length=1)
    """Globs of parameter names; the weights that none of them matches stay as they are."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Share of the old average that each optimiser step keeps. The stage's model is then the moving
    average of its weights, which begins with the start. InstructGPT: 0.992."""

    @model_validator(mode="after")
    def _lr_end_is_read(self) -> Self:
        if self.lr_schedule == "constant":
            refuse_unread(self, "lr_end", because="lr_schedule = constant")
        return self


class InModes(BaseModel):
    """In which modes a stage asks or shows its problems; mixed into those that draw problems."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    modes: tuple[Mode, ...] = ()
    """Each problem occurs in each of them; without any, the chat template is asked as it stands.
    Comes from the recipe's `mode`."""

    @model_validator(mode="after")
    def _modes_differ(self) -> Self:
        if len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes = {list(self.modes)}: name each mode once")
        return self


class DomainShares(BaseModel):
    """How much of a batch each domain has; mixed into the stages that draw and train."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset({"domain_shares"})

    domain_shares: dict[str, Weight] = Field(default_factory=dict)
    """Share of every batch that a domain has, relative to the sum of all; even where none is given.
    It names all domains; 0 leaves one out."""

    @model_validator(mode="after")
    def _some_domain_is_drawn(self) -> Self:
        if self.domain_shares and not any(self.domain_shares.values()):
            raise ValueError(
                "domain_shares gives every domain a share of 0, so that there is nothing to draw; "
                "give one of them a share above 0"
            )
        return self


class WithAux(BaseModel):
    """Losses beside the stage's own; mixed into the stages that train a language model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset({"aux"})

    aux: dict[str, Weight] = Field(default_factory=dict)
    """Name of an auxiliary loss to its weight: weight times the mean cross-entropy per token is
    added to the stage's mean loss. The recipe gives it with its data."""
    aux_batch_size: int = Field(32, gt=0)
    """Rows of each auxiliary loss per optimiser step, drawn evenly over its domains."""
    aux_modes: dict[str, tuple[Mode, ...]] = Field(default_factory=dict)
    """Modes of the demonstrations that an auxiliary loss reads; filled in by the recipe."""

    @model_validator(mode="after")
    def _batch_is_read(self) -> Self:
        if not self.aux:
            refuse_unread(self, "aux_batch_size", because="no aux")
        schedule = getattr(self, "schedules", {}).get("aux")
        for weights in [] if schedule is None else schedule.possible_values():
            if isinstance(weights, dict) and weights.keys() != self.aux.keys():
                raise ValueError(
                    f"aux: its schedule names {', '.join(weights) or 'none'} at one step and "
                    f"{', '.join(self.aux) or 'none'} at the first; give each weight a schedule of "
                    "its own"
                )
        unknown = [name for name in self.aux_modes if name not in self.aux]
        if unknown:
            raise ValueError(f"aux_modes: {unknown[0]!r} is not an auxiliary loss")
        return self


class Correction(BaseModel):
    """Importance correction between the policy that sampled and the one that learns."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset({"correction_low", "correction_high"})

    correction: Literal["none", "truncated", "icepop", "sequence_truncated", "sequence_icepop"] = (
        "none"
    )
    """`truncated`: min(ratio, high). `icepop`: tokens whose ratio is outside [low, high] drop. With
    `sequence_` the ratio is that of the whole response."""
    correction_low: float = Field(0.5, ge=0, le=1)
    correction_high: float = Field(5.0, ge=1)

    @model_validator(mode="after")
    def _bounds_are_read(self) -> Self:
        if not self.correction.endswith("icepop"):
            refuse_unread(self, "correction_low", because=f"correction = {self.correction}")
        if self.correction == "none":
            refuse_unread(self, "correction_high", because="correction = none")
        return self


class Aggregation(BaseModel):
    """How the losses of tokens are averaged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over tokens, over rows of row means, or over rows of sums divided by a constant."""
    aggregation_constant: int | None = Field(None, gt=0)
    """The constant; `max_new_tokens` if not given."""

    @model_validator(mode="after")
    def _constant_is_read(self) -> Self:
        if self.aggregation != "constant":
            refuse_unread(self, "aggregation_constant", because=f"aggregation = {self.aggregation}")
        return self


class Rollout(BaseModel):
    """How a stage samples."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset({"max_new_tokens", "temperature"})

    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, gt=0)
    updates_per_batch: int = Field(1, gt=0)
    """Optimiser steps per batch of rollouts, each on an equal share of its rows."""
