"""Settings of what makes or judges models without training them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from posttrain.algorithms import Average, DareLinear, MergeHow, TaskArithmetic
from posttrain.rewards.judge_kinds import JudgeSetting
from posttrain.stages.settings.base import Computing, LongRows, Modes, SaveDtype
from posttrain.stages.settings.data import asked_by
from posttrain.values import Settings


class Evaluate(Settings, Computing, LongRows):
    """Accuracy of several models on problems that no training stage can draw from."""

    modes: Modes = ()
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
    judges: dict[str, Annotated[JudgeSetting, asked_by("evaluate")]] = Field(default_factory=dict)
    """Domain to the judge of its responses; comes from the recipe's `judges`."""
    routes: dict[str, str] = Field(default_factory=dict)
    """Domain to teacher; filled in by the recipe."""


class Merge(Settings):
    """One model out of the weights of several: `r.merge({name: model})`."""

    seed: int = Field(0, ge=0, lt=2**31)
    """What DARE drops follows from it."""
    how: MergeHow = Average()
    """All but `Average` add up differences from a base."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of a model; 1 where none is given. Only `Average` divides by their sum."""
    save_dtype: SaveDtype = "base"
    """Type of the weights in the result: the widest of the models' files, or this one."""

    @model_validator(mode="after")
    def _signs_can_be_elected(self) -> Self:
        negative = [name for name, weight in self.weights.items() if weight < 0]
        if negative and not isinstance(self.how, TaskArithmetic | DareLinear):
            raise ValueError(
                f"weights: {negative[0]} = {self.weights[negative[0]]} with how = "
                f"{self.how.kind}; a "
                "negative weight takes a difference away, which task_arithmetic and dare_linear do"
            )
        return self


class Best(Settings, Computing, LongRows):
    """The best of several models, by problems that no training stage can draw from."""

    modes: Modes = ()
    judge: Annotated[JudgeSetting | None, asked_by("best")] = None
    """Whose score decides in place of the verifier's; comes from the recipe's `judge`."""
    length_weight: float = Field(0.0, ge=0)
    """Taken off the score per `max_new_tokens` of mean response length."""
    num_problems: int = Field(200, gt=1)
    """Per domain, from the validation split; fewer if it has fewer."""
    samples: int = Field(2, ge=0)
    """Responses per problem at temperature 1; 0 takes one greedy response."""
    max_new_tokens: int = Field(64, gt=0)
    bootstrap: int = Field(2000, ge=100)
    """Resamples of the problems behind each 95 % interval."""

    @property
    def metric(self) -> str:
        """What the value of a candidate is called."""
        if self.judge is not None:
            return "score"
        return "accuracy" if self.samples else "greedy"


class Harness(Settings, Computing):
    """Scores of a model on tasks of lm-eval (EleutherAI's evaluation harness)."""

    tasks: list[str] = Field(min_length=1)
    """Names of tasks or groups as lm-eval has them."""
    fewshot: int | None = Field(None, ge=0)
    """Solved examples before each question; None: what the task says."""
    limit: int | None = Field(None, gt=0)
    """Problems of each task, its first ones; None: all."""
    chat_template: bool = True
    """Ask through the model's chat template, examples as turns of the conversation."""
    system: str = ""
    """A system message before each question; with the chat template only."""
    max_new_tokens: int | None = Field(None, gt=0)
    """Longest response; None: what the task says, 256 where it says nothing."""
    bootstrap: int = Field(1000, ge=100)
    """Resamples behind the standard errors of metrics that are no means."""

    @model_validator(mode="after")
    def _system_needs_a_template(self) -> Self:
        if self.system and not self.chat_template:
            raise ValueError("system is a message of the chat template; leave it out without one")
        return self
