"""Settings of what makes or judges models without training them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.stages.settings.base import Config, InModes, refuse_unread


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


class Best(Config, InModes):
    """The best of several models, by problems that no training stage can draw from."""

    metric: Literal["accuracy", "greedy"] = "accuracy"
    """Mean reward at temperature 1, or of greedy responses."""
    length_weight: float = Field(0.0, ge=0)
    """Taken off the metric per `max_new_tokens` of mean response length."""
    num_problems: int = Field(200, gt=1)
    """Per domain, from the validation split; fewer if it has fewer."""
    samples: int = Field(2, gt=0)
    """Responses per problem at temperature 1."""
    max_new_tokens: int = Field(64, gt=0)
    bootstrap: int = Field(2000, ge=100)
    """Resamples of the problems behind each 95 % interval."""

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
