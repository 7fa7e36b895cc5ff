"""Settings of the operators on data: no weights change."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.stages.settings.base import Config, InModes, refuse_unread


class Sample(Config, InModes):
    """Responses of one or more models, scored by the domain's verifier."""

    k: int = Field(4, gt=0)
    """Responses per prompt."""
    num_prompts: int = Field(1000, gt=0)
    """Prompts per domain, from the training split."""
    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, ge=0)
    routes: dict[str, str] = Field(default_factory=dict)
    """Domain to the model that samples it; filled in by the recipe."""


class Select(BaseModel):
    """Rollouts to imitate: `r.select(rollouts, how="correct")`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    how: Literal["correct", "best", "shortest_correct"] = "correct"
    """All with full reward, those that tie for the prompt's best reward above 0, or the shortest
    with full reward."""
    max_per_prompt: int = Field(4, gt=0)

    @model_validator(mode="after")
    def _number_is_read(self) -> Self:
        if self.how == "shortest_correct":
            refuse_unread(self, "max_per_prompt", because="how = shortest_correct")
        return self
