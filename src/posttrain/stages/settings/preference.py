"""Settings of what has to do with preferences: pairs, and the stages that learn from them."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from posttrain.algorithms import (
    BestAgainstWorst,
    BradleyTerry,
    Dpo,
    Pairing,
    Preference,
    Repetition,
    RewardLoss,
    StrongAgainstWeak,
)
from posttrain.rewards.judge_kinds import Judge, JudgeSetting
from posttrain.stages.settings.base import AuxLosses, Computing, Lengths, Training
from posttrain.stages.settings.data import check_characters, check_judge
from posttrain.values import Settings, changing


class Pairs(Settings):
    """Preference pairs out of rollouts: `r.pairs(rollouts)`, `r.pairs(strong, against=weak)`."""

    how: Pairing = BestAgainstWorst()
    """Which responses go against each other."""
    min_chosen_reward: float | None = Field(None, gt=0, le=1)
    """Least reward of the chosen response."""
    max_length_gap: int | None = Field(None, ge=0)
    """Most characters by which the two responses may differ in length."""
    chosen_max_tokens: int | None = Field(None, gt=0)
    """Most tokens of the chosen response, stop token included."""
    chosen_language: str | None = None
    """Regular expression for one allowed character; the chosen response has no other one."""
    chosen_max_repetition: Repetition | None = None
    """Most repeated n-grams of words in the chosen response."""

    judge: JudgeSetting | None = None
    """Who says which response is better; comes from the recipe's `judge`."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Which pairs are random, and the noise of the oracle, follow from it."""

    _language = field_validator("chosen_language")(check_characters)

    @property
    def pairwise(self) -> bool:
        """Whether the judge is asked about pairs, not about responses."""
        return self.judge is not None and self.how.kind in self.judge.PAIRS

    @property
    def by(self) -> str:
        """The value of a response that is compared."""
        return self.how.by or ("reward" if self.judge is None else "score")

    @field_validator("judge")
    @classmethod
    def _pairs_can_ask_it(cls, judge: Judge | None) -> Judge | None:
        return check_judge(judge, "pairs")

    @model_validator(mode="after")
    def _judge_is_asked(self) -> Self:
        if self.judge is not None and isinstance(self.how, StrongAgainstWeak):
            raise ValueError("how = strong_against_weak asks no judge; leave judge out")
        if self.judge is not None and self.by != "score":
            raise ValueError("a judge gives scores; leave by out")
        return self


class DpoStage(Lengths, Settings, Computing, Training):
    """Learning from preferences: `r.dpo(start=..., data=r.pairs(...))`."""

    batch_size: int = changing(32, gt=0)
    """Pairs per step, drawn evenly over the domains unless `domain_shares` are given."""
    loss: Preference = Dpo()
    """What is descended; `SimPO` needs no reference."""
    mask_formatting: bool = False
    """Leave special tokens, the end of the turn among them, out of the preference loss."""
    aux: AuxLosses = Field(default_factory=dict)


class RewardModel(Lengths, Settings, Computing, Training):
    """A reward model from preference pairs: `r.reward_model(start=..., data=r.pairs(...))`."""

    batch_size: int = changing(32, gt=0)
    """Pairs per step, or prompts with `per_prompt`; evenly over the domains unless `domain_shares`
    are given."""
    loss: RewardLoss = BradleyTerry()
    per_prompt: bool = False
    """Draw prompts with all of their pairs, which count together as one (InstructGPT)."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts that is not learned from, and gives `heldout_accuracy`."""
