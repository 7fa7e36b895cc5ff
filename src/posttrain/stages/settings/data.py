"""Settings of the operators on data: no weights change."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from posttrain.algorithms import (
    BestAgainstWorst,
    Correct,
    Near,
    Pairing,
    Repetition,
    Selection,
    Share,
    StrongAgainstWeak,
)
from posttrain.backends.prompting import Mode
from posttrain.rewards.judge_kinds import Judge, JudgeSetting, check_use
from posttrain.stages.settings.base import Computing, LongRows, Modes
from posttrain.values import Settings


def check_characters(value: str) -> str:
    """Raise ValueError unless `value` is a regular expression for one allowed character."""
    try:
        re.compile(f"(?:{value})*")
    except re.error as error:
        raise ValueError(
            f"{value!r} is no regular expression ({error}); give the characters that may occur, "
            "for example [ -~]"
        ) from None
    return value


def asked_by(kind: str) -> AfterValidator:
    """The check that a stage of this kind, which has no steps, can ask a judge."""

    def check(judge: Judge | None) -> Judge | None:
        if judge is None:
            return None
        check_use(judge, kind, where="judge")
        if judge.scheduled:
            raise ValueError(
                "the judge has a weight with a schedule, and the stage has no steps; give a number"
            )
        return judge

    return AfterValidator(check)


Characters = Annotated[str, AfterValidator(check_characters)]
"""A regular expression for one allowed character."""


def check_range(settings: Settings, low: str, high: str, otherwise: str) -> None:
    """Raise ValueError where the setting `low` is above the setting `high`, either None apart."""
    least, most = getattr(settings, low), getattr(settings, high)
    if least is not None and most is not None and least > most:
        raise ValueError(f"{low} = {least} is above {high} = {most}: {otherwise}")


class Answering(BaseModel):
    """Which prompts a stage answers that samples without training, and how."""

    first_prompt: int = Field(0, ge=0)
    """The first prompt of a domain that is used, counted round its end: rounds can draw others."""
    num_prompts: int = Field(1000, gt=0)
    """Prompts per domain, from the training split; none is used twice."""
    modes: Modes = ()
    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Tokens are drawn from the likeliest ones that have this probability together."""


class Sample(Settings, Computing, LongRows, Answering):
    """Responses of one or more models, scored by the domain's verifier."""

    k: int = Field(4, gt=0)
    """Responses per prompt and model."""
    prefix: str = ""
    """Text that every response begins with; the model goes on from it."""
    routes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Domain to the models that sample it; filled in by the recipe."""


class Score(Settings, Computing, LongRows):
    """Rollouts with what a judge says of them: `r.score(rollouts, judge=...)`."""

    judge: Annotated[JudgeSetting, asked_by("score")]
    """Comes from the recipe's `judge`."""


class Profile(Settings, Computing, LongRows, Answering):
    """How often a model solves each problem: `r.profile(model, prompts=...)`."""

    n: int = Field(8, gt=0)
    """Responses per prompt."""


class Filter(Settings):
    """Prompts by how hard they are for a model: `r.filter(prompts, profile=...)`."""

    modes: Modes = ()
    seed: int = Field(0, ge=0, lt=2**31)
    """Which of the unsolved prompts are kept follows from it."""
    low: Share = 0.0
    high: Share = 1.0
    """The band of pass rates that is kept, both ends included."""
    against_low: Share = 0.0
    against_high: Share = 1.0
    """The same for the pass rate of the other profile."""
    min_gain: float | None = Field(None, ge=-1, le=1)
    """Least pass rate in the profile minus that in the other one."""
    keep_unsolved: float | None = Field(None, ge=0, le=1)
    """Share of the prompts with pass rate 0 that is kept, whatever the band; without it the band
    decides about them too."""
    at_least: int = Field(0, ge=0)
    """Prompts per domain: where fewer are left, those nearest to what is asked for come back."""

    @model_validator(mode="after")
    def _bands_are_bands(self) -> Self:
        check_range(self, "low", "high", "no pass rate lies between them")
        check_range(self, "against_low", "against_high", "no pass rate lies between them")
        return self


class Select(Settings):
    """Rollouts to imitate: `r.select(rollouts, how="correct")`."""

    how: Selection = Correct()
    """Which of them, and how many of each prompt."""
    min_tokens: int | None = Field(None, gt=0)
    max_tokens: int | None = Field(None, gt=0)
    """Bounds on the length of a response, stop token included."""
    language: Characters | None = None
    """Regular expression for one allowed character; a response with any other one is left out."""
    max_repetition: Repetition | None = None
    """Most repeated n-grams of words that a response may have."""
    first_step: int | None = Field(None, ge=0)
    last_step: int | None = Field(None, ge=0)
    """Of the rollouts of an `rl` stage those of these steps, counted from 0, both included."""
    strip_thought: bool = False
    """Leave out what stands before `</think>`, and make such rows rows of the mode no_think."""

    @model_validator(mode="after")
    def _ranges_hold_something(self) -> Self:
        check_range(self, "min_tokens", "max_tokens", "nothing is left")
        check_range(self, "first_step", "last_step", "nothing is left")
        return self


class Pairs(Settings, LongRows):
    """Preference pairs out of rollouts: `r.pairs(rollouts)`, `r.pairs(strong, against=weak)`."""

    how: Pairing = BestAgainstWorst()
    """Which responses go against each other."""
    min_chosen_reward: float | None = Field(None, gt=0, le=1)
    """Least reward of the chosen response."""
    max_length_gap: int | None = Field(None, ge=0)
    """Most characters by which the two responses may differ in length."""
    chosen_max_tokens: int | None = Field(None, gt=0)
    """Most tokens of the chosen response, stop token included."""
    chosen_language: Characters | None = None
    """Regular expression for one allowed character; the chosen response has no other one."""
    chosen_max_repetition: Repetition | None = None
    """Most repeated n-grams of words in the chosen response."""

    judge: Annotated[JudgeSetting | None, asked_by("pairs")] = None
    """Who says which response is better; comes from the recipe's `judge`."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Which pairs are random, and the noise of the oracle, follow from it."""

    @property
    def pairwise(self) -> bool:
        """Whether the judge is asked about pairs, not about responses."""
        return self.judge is not None and self.how.kind in self.judge.PAIRS

    @property
    def by(self) -> str:
        """The value of a response that is compared."""
        return self.how.by or ("reward" if self.judge is None else "score")

    @property
    def compares_values(self) -> bool:
        """Whether the chosen response has to have the higher value."""
        how = self.how
        asked = how.by is not None or how.min_margin is not None
        return asked or not isinstance(how, StrongAgainstWeak)

    @model_validator(mode="after")
    def _judge_is_asked(self) -> Self:
        if self.judge is not None and isinstance(self.how, StrongAgainstWeak):
            raise ValueError("how = strong_against_weak asks no judge; leave judge out")
        if self.judge is not None and self.by != "score":
            raise ValueError("a judge gives scores; leave by out")
        return self


class Part(Settings):
    """One of the sources of a mix."""

    weight: float = Field(gt=0)
    edge: str | None = None
    """The data stage; without one the demonstrations of `domains`."""
    domains: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ()
    demo_noise: float = Field(0.0, ge=0, le=1)
    """Those of the demonstrations."""


class Mix(Settings):
    """Data of several sources in given shares: `r.mix({data: weight}, by="rows")`."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Which rows are drawn, and their order, follow from it."""
    by: Literal["rows", "tokens"] = "rows"
    """Whether weights are shares of the rows or of the demonstrations' tokens."""
    rows: int | None = Field(None, gt=0)
    """Rows of the mix; sources that are too small repeat. Without it as many as can be had with no
    row twice."""
    parts: tuple[Part, ...] = ()
    """The sources and their weights; filled in by the recipe."""


class Dedup(Settings):
    """Data without repeats: `r.dedup(data, near=0.8)`."""

    of: Literal["row", "prompt", "demo"] = "row"
    """What is compared: prompt and demonstration, or one of them."""
    near: Near | None = None
    """How alike two texts have to be; without it they must be equal."""


class Comparisons(Settings):
    """Problems that train a judge: `r.comparisons(rollouts)`."""

    max_per_prompt: int = Field(2, gt=0)
    """Of a problem's responses the n-th best goes against the n-th worst, for so many n."""
    min_margin: float = Field(0.0, ge=0, lt=1)
    """Their rewards differ by more than this."""
    template: str | None = None
    """What is asked, with {prompt}, {a}, {b} and {answer}; "c {prompt}|{a}|{b}" if not given."""
