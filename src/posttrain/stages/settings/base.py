"""What the settings of several kinds have in common: seeds, optimiser, sampling, averaging.

Kept apart from the stage loops so that planning a run imports neither torch nor transformers. A
setting is part of a stage's identity: change it and the stage runs again. Paths, threads and
devices are therefore not here.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from posttrain.engine.errors import ConfigError
from posttrain.modes import Mode
from posttrain.schedules import History, Schedule, is_schedule, possible_values, steps, value_at

Positive = Field(gt=0)
Weight = Annotated[float, Field(ge=0)]


def refuse_unread(config: BaseModel, *fields: str, because: str) -> None:
    """Raise ValueError for a setting that was changed and that nothing reads."""
    for name in fields:
        field = type(config).model_fields[name]
        value, default = getattr(config, name), field.get_default(call_default_factory=True)
        if value != default:
            raise ValueError(
                f"{name} = {value}: it is not read with {because}; leave it out, or change the "
                "other setting"
            )


def steps_or_epochs(steps: int | None, epochs: float | None) -> None:
    """Raise ValueError unless a stage has exactly one of its two lengths."""
    if (steps is None) == (epochs is None):
        raise ValueError("give exactly one of steps and epochs")


class Config(BaseModel):
    """Base of the settings of stages that compute with models: an unknown name is an error.

    Where a stage has steps, the settings in its `SCHEDULABLE` may be given as a schedule
    (`posttrain.schedules`): the field then holds the first value, `schedules` the rest, and `at`
    the settings of a step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset()

    seed: int = Field(0, ge=0, lt=2**31)
    """Every random choice of the stage follows from it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type in which models compute. Weights that are trained stay in float32, and so does every
    softmax of a loss."""
    schedules: dict[str, Schedule] = Field(default_factory=dict)
    """Setting to its schedule; filled in where a setting is given as a schedule."""

    @model_validator(mode="before")
    @classmethod
    def _take_schedules(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        found = {name: value for name, value in values.items() if is_schedule(value)}
        kept = {**values.get("schedules", {}), **found}
        for name in kept:
            if name not in cls.SCHEDULABLE:
                choices = ", ".join(sorted(cls.SCHEDULABLE)) or "none of this stage"
                raise ValueError(f"{name} cannot have a schedule; settings that can: {choices}")
        try:
            firsts = {name: possible_values(value)[0] for name, value in found.items()}
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return {**values, **firsts, **({"schedules": kept} if kept else {})}

    @model_validator(mode="after")
    def _scheduled_values_fit(self) -> Self:
        plain = {name: getattr(self, name) for name in type(self).model_fields}
        # As constants, so that what a schedule makes sense of stays sensible, and nothing recurs.
        plain["schedules"] = {n: steps({0: getattr(self, n)}) for n in self.schedules}
        for name, schedule in self.schedules.items():
            for value in possible_values(schedule)[1:]:
                try:
                    type(self)(**{**plain, name: value})
                except ValidationError as error:
                    message = error.errors()[0]["msg"]
                    raise ValueError(f"{name} = {value} of its schedule: {message}") from None
        return self

    def at(self, step: int, total: int, history: History) -> Self:
        """The settings of 0-based `step` of `total`, schedules resolved."""
        if not self.schedules:
            return self
        now = {n: value_at(s, step, total, history) for n, s in self.schedules.items()}
        return self.model_copy(update=now)


class Optimizer(BaseModel):
    """AdamW and its learning-rate schedule; mixed into the stages that train."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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


class WithAux(BaseModel):
    """Losses beside the stage's own; mixed into the stages that train from a start."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
        unknown = [name for name in self.aux_modes if name not in self.aux]
        if unknown:
            raise ValueError(f"aux_modes: {unknown[0]!r} is not an auxiliary loss")
        return self


class Correction(BaseModel):
    """Importance correction between the policy that sampled and the one that learns."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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

    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, gt=0)
    updates_per_batch: int = Field(1, gt=0)
    """Optimiser steps per batch of rollouts, each on an equal share of its rows."""
