"""What the settings of several kinds of stages have in common.

Kept apart from the loops, so that planning a run imports neither torch nor transformers. A setting
is part of a stage's identity: change it and the stage runs again. Paths, threads and devices are
therefore not here.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from posttrain.algorithms import AdamW, Aggregation, Aux, CosineDecay, Decay, LoRA, TokenMean
from posttrain.backends.prompting import Mode, check_hint
from posttrain.engine.exact import exact
from posttrain.schedules import is_schedule
from posttrain.values import changing

Weight = Annotated[float, Field(ge=0)]


class Computing(BaseModel):
    """What every stage that computes with models has."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Every random choice of the stage follows from it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type in which models compute. Weights that are trained stay in float32 unless the optimiser's
    `master` says otherwise, and so does every softmax of a loss."""


SaveDtype = Literal["base", "float32", "bfloat16", "float16"]
"""Type of saved weights; "base": that of the files a stage starts from, tensor by tensor."""


class Training(BaseModel):
    """What every stage that trains has."""

    lr: float = changing(1e-5, gt=0)
    """Peak learning rate."""
    lr_decay: Decay = CosineDecay()
    """How it falls after the warm-up."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear rise from 0 to `lr`; at most half of the stage."""
    optimizer: AdamW = AdamW()
    trainable: list[str] = Field(default_factory=lambda: ["*"], min_length=1)
    """Globs of parameter names; the weights that none of them matches stay as they are."""
    save_dtype: SaveDtype = "base"
    """Type of the weights in the result: that of the start's files, or this one. While they learn,
    and in step checkpoints, weights and moments have the types that `optimizer` says."""
    domain_shares: dict[str, Weight] = changing({})
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

    @model_validator(mode="after")
    def _rounded_weights_are_narrow(self) -> Self:
        precision = getattr(self, "precision", "float32")
        if self.optimizer.master == "stochastic" and precision != "bfloat16":
            raise ValueError(
                f'optimizer: master = "stochastic" with precision = "{precision}": weights that '
                'compute in float32 need no rounding; set precision = "bfloat16", or leave master '
                "out"
            )
        return self


class Adapting(BaseModel):
    """What every stage has that can train an adapter."""

    lora: LoRA | None = None
    """Train an adapter in place of the weights; None trains the weights."""

    @model_validator(mode="after")
    def _one_of_both_learns(self) -> Self:
        trainable = getattr(self, "trainable", ["*"])
        master = getattr(self, "optimizer", AdamW()).master
        if self.lora is not None and master != "float32":
            raise ValueError(
                f"lora and optimizer.master = {master}: an adapter is small and learns in float32; "
                "leave optimizer.master out"
            )
        if self.lora is not None and trainable != ["*"]:
            raise ValueError(
                f"lora and trainable = {trainable}: with lora the adapter learns and no weight of "
                "the start; say with lora.targets which layers get one, and leave trainable out"
            )
        return self


class LongRows(BaseModel):
    """What every stage that reads rows has."""

    on_long: Literal["error", "drop", "truncate"] = "error"
    """Rows with more tokens than the models have positions are refused before the first step, left
    out, or shortened: a demonstration or response at its end, a prompt at the beginning of its
    longest message."""


class Rollouts(BaseModel):
    """What the stages have that sample, and learn from that."""

    max_new_tokens: int = changing(64, gt=0)
    temperature: float = changing(1.0, gt=0)
    num_minibatches: int = Field(1, gt=0)
    """Optimiser steps per batch of rollouts, each on an equal share of its rows."""
    aggregation: Aggregation = TokenMean()
    """How the losses of tokens become one number."""
    mask_unfinished: bool = False
    """Leave responses that were cut at the length limit out of the loss (DAPO's overlong
    filtering)."""
    per_kept: bool = False
    """Divide the loss by the rows or tokens that are learned from instead of all of the batch
    (DAPO, where those that are left out were replaced)."""


def _different(modes: tuple[Mode, ...]) -> tuple[Mode, ...]:
    if len(set(modes)) < len(modes):
        raise ValueError(f"modes = {list(modes)}: name each mode once")
    return modes


def _weighted(value: object) -> object:
    """`0.5` as `Aux(0.5)`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"weight": value} if number or is_schedule(value) else value


Template = Annotated[str, AfterValidator(check_hint)]
"""Text in which columns of a problem stand in braces."""
Modes = Annotated[tuple[Mode, ...], BeforeValidator(tuple), BeforeValidator(_different)]
"""In which modes a stage asks or shows its problems, each in each of them; without any the chat
template is asked as it stands. Comes from the recipe's `mode`."""
AuxLosses = dict[str, Annotated[Aux, BeforeValidator(_weighted)]]
"""Losses beside the stage's own, by name. The recipe gives each with its data."""


class Lengths(BaseModel):
    """A length in steps or in passes over the data."""

    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    """Passes over the data; give this or `steps`."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    def num_steps(self, num_rows: int, batch_size: int) -> int:
        """The steps of the stage, with `num_rows` in a pass over its data."""
        if self.steps is not None:
            return self.steps
        return math.ceil(exact(self.epochs or 0) * num_rows / batch_size)

    def check_schedules(self) -> None:
        """Raise ValueError where the steps of a pass would not be known before."""
        if self.epochs is not None and "batch_size" in getattr(self, "schedules", {}):
            raise ValueError(
                f"epochs = {self.epochs:g} with a schedule of batch_size: the steps of a pass are "
                "not known before; give steps instead"
            )
