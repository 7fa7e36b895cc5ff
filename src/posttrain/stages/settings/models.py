"""Settings of what makes or judges models without training them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from posttrain.rewards.judge_kinds import Judge, JudgeSetting
from posttrain.stages.settings.base import InModes
from posttrain.stages.settings.data import check_judge
from posttrain.stages.settings.scheduled import Config, refuse_unread


class Evaluate(Config, InModes):
    """Accuracy of several models on problems that no training stage can draw from."""

    split: Literal["heldout", "validation"] = "heldout"
    num_problems: int = Field(400, gt=1)
    """Per domain; fewer if the split has fewer."""
    samples: int = Field(2, gt=0)
    """Responses per problem at temperature 1, besides one greedy response."""
    max_new_tokens: int = Field(64, gt=0)
    bootstrap: int = Field(2000, ge=100)
    """Resamples of the problems behind each 95 % interval."""
    transcripts: int = Field(6, ge=0)
    """Problems per domain whose responses are kept for the report."""
    routes: dict[str, str] = Field(default_factory=dict)
    """Domain to teacher; filled in by the recipe."""


class Merge(BaseModel):
    """One model out of the weights of several: `r.merge({name: model})`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = Field(0, ge=0, lt=2**31)
    """What DARE drops follows from it."""
    how: Literal["average", "task_arithmetic", "ties", "dare_linear", "dare_ties"] = "average"
    """All but `average` add up differences from a base."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of a model; 1 where none is given. Only `average` divides by their sum."""
    density: float = Field(0.2, gt=0, le=1)
    """Share of each difference that stays: the largest with `ties`, a random share with DARE."""
    scale: float = Field(1.0, gt=0)
    """What the merged difference is multiplied with before it is added to the base."""

    @model_validator(mode="after")
    def _numbers_are_read(self) -> Self:
        because = f"how = {self.how}"
        if self.how in ("average", "task_arithmetic"):
            refuse_unread(self, "density", because=because)
        if self.how == "average":
            refuse_unread(self, "scale", because=because)
        return self

    @model_validator(mode="after")
    def _signs_can_be_elected(self) -> Self:
        negative = [name for name, weight in self.weights.items() if weight < 0]
        if negative and self.how not in ("task_arithmetic", "dare_linear"):
            raise ValueError(
                f"weights: {negative[0]} = {self.weights[negative[0]]} with how = {self.how}; a "
                "negative weight takes a difference away, which task_arithmetic and dare_linear do"
            )
        return self


class Best(Config, InModes):
    """The best of several models, by problems that no training stage can draw from."""

    metric: Literal["accuracy", "greedy", "score"] = "accuracy"
    """Mean reward at temperature 1, of greedy responses, or the judge's score at temperature 1."""
    judge: JudgeSetting | None = None
    """Whose score it is, in its JSON form; comes from the recipe's `judge`."""
    length_weight: float = Field(0.0, ge=0)
    """Taken off the metric per `max_new_tokens` of mean response length."""
    num_problems: int = Field(200, gt=1)
    """Per domain, from the validation split; fewer if it has fewer."""
    samples: int = Field(2, gt=0)
    """Responses per problem at temperature 1."""
    max_new_tokens: int = Field(64, gt=0)
    bootstrap: int = Field(2000, ge=100)
    """Resamples of the problems behind each 95 % interval."""

    @field_validator("judge")
    @classmethod
    def _best_can_ask_it(cls, judge: Judge | None) -> Judge | None:
        return check_judge(judge, "best")

    @model_validator(mode="after")
    def _judge_is_asked(self) -> Self:
        if (self.judge is None) == (self.metric == "score"):
            given = "no judge" if self.judge is None else "a judge"
            raise ValueError(f"metric = {self.metric} with {given}: give both or neither")
        return self

    @model_validator(mode="after")
    def _samples_are_read(self) -> Self:
        if self.metric == "greedy":
            refuse_unread(self, "samples", because="metric = greedy")
        return self


class DomainData(BaseModel):
    """A domain's problems; its settings come from the suite, not from a recipe."""

    model_config = ConfigDict(frozen=True, extra="allow")


class ExternalModel(BaseModel):
    """A checkpoint from outside; its identity is the bytes of its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")
