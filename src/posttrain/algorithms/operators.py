"""Choices of the stages that train nothing: merging weights, choosing among rollouts and rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from posttrain.values import ByKind, Settings, tag

# Merging weights (posttrain/backends/merging.py).


class Average(Settings):
    """The weighted mean of the models."""

    kind: Literal["average"] = tag("average")


class TaskArithmetic(Settings):
    """The base plus the weighted sum of what the models learned on it (arXiv 2212.04089)."""

    kind: Literal["task_arithmetic"] = tag("task_arithmetic")
    scale: float = Field(1.0, gt=0)
    """What the sum is multiplied with before it is added to the base."""


class Ties(Settings):
    """Trimmed differences, and of each number only those of the elected sign (arXiv 2306.01708)."""

    kind: Literal["ties"] = tag("ties")
    density: float = Field(0.2, gt=0, le=1)
    """Share of each difference that stays, the largest."""
    scale: float = Field(1.0, gt=0)


class DareLinear(Settings):
    """A random share of each difference, rescaled, added up (arXiv 2311.03099)."""

    kind: Literal["dare_linear"] = tag("dare_linear")
    density: float = Field(0.2, gt=0, le=1)
    """Share of each difference that stays, at random."""
    scale: float = Field(1.0, gt=0)


class DareTies(Settings):
    """The same, with the signs elected as in `Ties`."""

    kind: Literal["dare_ties"] = tag("dare_ties")
    density: float = Field(0.2, gt=0, le=1)
    scale: float = Field(1.0, gt=0)


MergeHow = Annotated[
    Average | TaskArithmetic | Ties | DareLinear | DareTies, Field(discriminator="kind"), ByKind
]


# Choosing among rollouts and rows (posttrain/stages/select.py, pairs.py, curation.py).

By = Literal["reward", "score"]
"""The verifier's reward, or the score of a `score` stage."""


class Correct(Settings):
    """All responses with full reward."""

    kind: Literal["correct"] = tag("correct")
    max_per_prompt: int | None = Field(4, gt=0)
    """Distinct responses kept per prompt; null keeps all."""


class ShortestCorrect(Settings):
    """Of each prompt the shortest response with full reward."""

    kind: Literal["shortest_correct"] = tag("shortest_correct")


class BestResponses(Settings):
    """Those that tie for the best of their prompt."""

    kind: Literal["best"] = tag("best")
    by: By = "reward"
    max_per_prompt: int | None = Field(4, gt=0)
    success: bool | None = None
    """true keeps responses with full reward, false the others, null both."""


class TopShare(Settings):
    """The best share of all responses, over all prompts."""

    kind: Literal["top_share"] = tag("top_share")
    share: float = Field(gt=0, le=1)
    by: By = "reward"
    max_per_prompt: int | None = Field(4, gt=0)
    success: bool | None = None


class AllResponses(Settings):
    """All responses."""

    kind: Literal["all"] = tag("all")
    max_per_prompt: int | None = Field(4, gt=0)
    success: bool | None = None


Selection = Annotated[
    Correct | ShortestCorrect | BestResponses | TopShare | AllResponses,
    Field(discriminator="kind"),
    ByKind,
]


class _Compared(BaseModel):
    """What every way of making pairs has."""

    by: By | None = None
    """The value that is compared: the score of the judge where there is one, else the reward."""
    min_margin: float | None = Field(default=None, gt=0)
    """Least value of the chosen response minus that of the rejected one; of a judge that compares
    two responses the least strength of its preference, 1 to 4. Without it any difference will do.
    `StrongAgainstWeak` looks at values only where this or `by` is given."""


class BestAgainstWorst(Settings, _Compared):
    """Of the responses to one problem the n-th best against the n-th worst."""

    kind: Literal["best_against_worst"] = tag("best_against_worst")
    max_per_prompt: int = Field(1, gt=0)


class StrongAgainstWeak(Settings, _Compared):
    """The strong stage's n-th response against the weak one's (delta learning, OLMo 3)."""

    kind: Literal["strong_against_weak"] = tag("strong_against_weak")
    max_per_prompt: int = Field(1, gt=0)


class AllPairs(Settings, _Compared):
    """All pairs of responses to one problem whose values differ."""

    kind: Literal["all"] = tag("all")


class RandomPairs(Settings, _Compared):
    """Some of these pairs at random."""

    kind: Literal["random"] = tag("random")
    max_per_prompt: int = Field(1, gt=0)


Pairing = Annotated[
    BestAgainstWorst | StrongAgainstWeak | AllPairs | RandomPairs,
    Field(discriminator="kind"),
    ByKind,
]


class Repetition(Settings):
    """Most repeated n-grams of words that a response may have, as a share of all of them."""

    share: float = Field(ge=0, lt=1)
    n: int = Field(3, gt=0)
    """Words of such an n-gram."""


class Near(Settings):
    """Texts count as the same from this Jaccard similarity of their n-grams on."""

    similarity: float = Field(gt=0, lt=1)
    ngram: int = Field(5, gt=0)
    """Characters of such an n-gram."""
