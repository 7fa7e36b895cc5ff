"""Settings of what has to do with preferences: pairs, and the stages that learn from them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from posttrain.rewards.judge_kinds import Judge, JudgeSetting
from posttrain.stages.settings.base import DomainShares, Optimizer, WithAux, one_length
from posttrain.stages.settings.data import check_characters, check_judge
from posttrain.stages.settings.scheduled import Config, refuse_unread


class Pairs(BaseModel):
    """Preference pairs out of rollouts: `r.pairs(rollouts)`, `r.pairs(strong, against=weak)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    how: Literal["best_against_worst", "strong_against_weak", "all", "random"] = (
        "best_against_worst"
    )
    """By value among the responses to one problem, by which of two stages a response is from, all
    pairs of one problem whose values differ, or some of those at random."""
    by: Literal["reward", "score"] = "reward"
    """The value: the verifier's reward, or the score of a `score` stage."""
    max_per_prompt: int = Field(1, gt=0)
    """The n-th best goes against the n-th worst, or the strong stage's n-th with the weak one's."""
    min_margin: float | None = Field(None, gt=0)
    """Least value of the chosen response minus that of the rejected one. Without it any
    difference will do, and strong_against_weak does not look at values at all."""
    min_chosen_reward: float | None = Field(None, gt=0, le=1)
    """Least reward of the chosen response."""
    max_length_gap: int | None = Field(None, ge=0)
    """Most characters by which the two responses may differ in length."""
    chosen_max_tokens: int | None = Field(None, gt=0)
    """Most tokens of the chosen response, stop token included."""
    chosen_language: str | None = None
    """Regular expression for one allowed character; the chosen response has no other one."""
    chosen_max_repetition: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Most repeated n-grams of three words in the chosen response, as a share of all of them."""

    judge: JudgeSetting | None = None
    """Who says which response is better, in its JSON form; comes from the recipe's `judge`."""
    min_strength: Annotated[int, Field(ge=2, le=4)] | None = None
    """Least strength of the preference, where the judge is asked about pairs."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Which pairs are random, and the noise of the oracle, follow from it."""

    _language = field_validator("chosen_language")(check_characters)

    @property
    def pairwise(self) -> bool:
        """Whether the judge is asked about pairs, not about responses."""
        return self.judge is not None and self.how in self.judge.PAIRS

    @field_validator("judge")
    @classmethod
    def _pairs_can_ask_it(cls, judge: Judge | None) -> Judge | None:
        return check_judge(judge, "pairs")

    @model_validator(mode="after")
    def _judge_is_asked(self) -> Self:
        if self.judge is not None and self.how == "strong_against_weak":
            raise ValueError("how = strong_against_weak asks no judge; leave judge out")
        if self.judge is not None and self.by != "score":
            raise ValueError("a judge gives scores; set by = score")
        if self.pairwise:
            refuse_unread(self, "min_margin", because="a judge of pairs; set min_strength")
        else:
            because = "a judge of pairs: oracle, or human with how all or random"
            if self.min_strength is not None:
                raise ValueError(f"min_strength = {self.min_strength}: it needs {because}")
        return self

    @model_validator(mode="after")
    def _how_reads(self) -> Self:
        if self.how == "all":
            refuse_unread(self, "max_per_prompt", because="how = all")
        if self.how == "strong_against_weak" and self.min_margin is None:
            refuse_unread(self, "by", because="how = strong_against_weak without min_margin")
        return self


class Dpo(Config, Optimizer, DomainShares, WithAux):
    """Learning from preferences: `r.dpo(start=..., data=r.pairs(...))`."""

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset(
        {
            "batch_size",
            "beta",
            "gamma",
            "label_smoothing",
            "nll_weight",
            "desirable_weight",
            "undesirable_weight",
        }
    )

    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    """Passes over the pairs; give this or `steps`."""
    batch_size: int = Field(32, gt=0)
    """Pairs per step, drawn evenly over the domains unless `domain_shares` are given."""
    loss: Literal["sigmoid", "length_normalised", "simpo", "ipo", "kto"] = "sigmoid"
    """`sigmoid` is DPO. `kto` learns from each response by itself. `simpo` needs no reference."""
    beta: float = Field(0.1, gt=0)
    """Reward per nat of the score. DPO 0.1, length_normalised 5 (Tülu 3), simpo 2 to 2.5."""
    gamma: float = Field(0.5, ge=0)
    """Margin that `simpo` asks for between the rewards."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs thought to be labelled the wrong way round."""
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)
    """Weights of chosen and rejected responses in `kto`."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the chosen response. Llama 3: 0.2."""
    mask_formatting: bool = False
    """Leave special tokens, the end of the turn among them, out of the preference loss."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        one_length(self)
        return self

    @model_validator(mode="after")
    def _loss_reads(self) -> Self:
        because = f"loss = {self.loss}"
        if self.loss != "simpo":
            refuse_unread(self, "gamma", because=because)
        if self.loss in ("ipo", "kto"):
            refuse_unread(self, "label_smoothing", because=because)
        if self.loss == "kto":
            refuse_unread(self, "nll_weight", because=because)
        else:
            refuse_unread(self, "desirable_weight", "undesirable_weight", because=because)
        return self


class RewardModel(Config, Optimizer, DomainShares):
    """A reward model from preference pairs: `r.reward_model(start=..., data=r.pairs(...))`."""

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset({"batch_size", "centring"})

    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    """Passes over the pairs; give this or `steps`."""
    batch_size: int = Field(32, gt=0)
    """Pairs per step, or prompts with `per_prompt`; evenly over the domains unless `domain_shares`
    are given."""
    loss: Literal["bradley_terry", "pointwise"] = "bradley_terry"
    """By the difference of the two rewards of a pair, or by each response as good or bad."""
    margins: Literal["none", "strength"] = "none"
    """`strength` asks for a larger difference of clearer preferences (Llama 2)."""
    centring: float = Field(0.0, ge=0)
    """Weight of the squared sum of a pair's rewards, which pulls their mean to 0. 0.01 is usual."""
    per_prompt: bool = False
    """Draw prompts with all of their pairs, which count together as one (InstructGPT)."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts that is not learned from, and gives `heldout_accuracy`."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        one_length(self)
        return self

    @model_validator(mode="after")
    def _loss_reads(self) -> Self:
        if self.loss == "pointwise":
            refuse_unread(self, "margins", "centring", because="loss = pointwise")
        return self
