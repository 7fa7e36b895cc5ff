"""Choices of reinforcement learning: surrogate, advantage, KL, correction, aggregation, draw."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from posttrain.algorithms.custom import Custom
from posttrain.values import ByKind, Settings, changing, tag

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Ratio = Literal["token", "sequence", "product"]


# Surrogates: what a policy-gradient step descends (posttrain/losses/policy.py).


class Clip(Settings):
    """The clipped surrogate of PPO, GRPO and DAPO; with ratio "sequence" GSPO's."""

    FUNCTION: ClassVar[str] = "posttrain.losses.policy:policy_gradient"

    kind: Literal["clip"] = tag("clip")
    clip_low: float = changing(0.2, gt=0, le=1)
    clip_high: float = changing(0.2, gt=0)
    ratio: Ratio = "token"
    """`sequence` is GSPO's geometric mean over the response, `product` the response's own."""
    dual_clip: float | None = changing(None, gt=1)
    """Bound on the loss of a negative advantage, in multiples of it."""


class Cispo(Settings):
    """Clips the weight of a token and keeps its gradient (MiniMax-M1, arXiv 2506.13585)."""

    FUNCTION: ClassVar[str] = "posttrain.losses.policy:cispo"

    kind: Literal["cispo"] = tag("cispo")
    clip_low: float = changing(0.2, gt=0, le=1)
    clip_high: float = changing(0.2, gt=0)
    ratio: Ratio = "token"


class Gmpo(Settings):
    """The geometric mean of clipped token ratios (arXiv 2507.20673); clips are of log ratios."""

    FUNCTION: ClassVar[str] = "posttrain.losses.policy:geometric_mean"

    kind: Literal["gmpo"] = tag("gmpo")
    clip_low: float = changing(0.2, gt=0, le=1)
    clip_high: float = changing(0.2, gt=0)


class Kimi(Settings):
    """Kimi's squared loss, a regression of the log ratio onto the advantage (arXiv 2501.12599)."""

    FUNCTION: ClassVar[str] = "posttrain.losses.policy:squared_log_ratio"

    kind: Literal["kimi"] = tag("kimi")
    tau: float = changing(1.0, gt=0)
    """Strength of the pull to the policy before the updates."""


Surrogate = Annotated[Clip | Cispo | Gmpo | Kimi | Custom, Field(discriminator="kind"), ByKind]


# Advantages: what each response, or each of its tokens, is credited with (posttrain/rl).


class GroupMean(Settings):
    """Reward less the mean of its group (Dr.GRPO, arXiv 2503.20783)."""

    BY_GROUP: ClassVar[bool] = True
    kind: Literal["group_mean"] = tag("group_mean")


class GroupZScore(Settings):
    """Less the mean of its group, over its standard deviation (GRPO, arXiv 2402.03300)."""

    BY_GROUP: ClassVar[bool] = True
    kind: Literal["group_zscore"] = tag("group_zscore")


class LeaveOneOut(Settings):
    """Less the mean of the other responses of its group (RLOO, arXiv 2402.14740)."""

    BY_GROUP: ClassVar[bool] = True
    kind: Literal["leave_one_out"] = tag("leave_one_out")


class LeaveOneOutZScore(Settings):
    """The same, whitened over the batch (TRL's `normalize_advantages` of RLOO)."""

    BY_GROUP: ClassVar[bool] = True
    kind: Literal["leave_one_out_zscore"] = tag("leave_one_out_zscore")


class BatchZScore(Settings):
    """Less the mean of its group, over the standard deviation of the batch (LitePPO)."""

    BY_GROUP: ClassVar[bool] = True
    kind: Literal["batch"] = tag("batch")


class Global(Settings):
    """A z-score over the whole batch (REINFORCE++, arXiv 2501.03262): groups are not read."""

    BY_GROUP: ClassVar[bool] = False
    kind: Literal["global"] = tag("global")


class Gae(Settings):
    """Of each token, by a critic that learns beside the policy (PPO; arXiv 1506.02438)."""

    BY_GROUP: ClassVar[bool] = False
    kind: Literal["gae"] = tag("gae")
    lam: float = changing(0.95, ge=0, le=1)
    """0 trusts the critic alone, 1 the rewards alone."""
    gamma: float = changing(1.0, ge=0, le=1)
    """Discount of a reward per token."""
    critic_lr: float | None = changing(None, gt=0)
    """Peak learning rate of the critic, over the steps as the policy's; `lr` if not given."""
    value_clip: float | None = changing(0.2, gt=0)
    """How far a value may move in the updates on one batch; None for no bound."""
    warmup_steps: int = Field(0, ge=0)
    """Steps at the beginning in which only the critic learns."""


Advantage = Annotated[
    GroupMean | GroupZScore | LeaveOneOut | LeaveOneOutZScore | BatchZScore | Global | Gae | Custom,
    Field(discriminator="kind"),
    ByKind,
]


class KL(Settings):
    """A KL divergence to a reference, the stage's start, that holds the policy."""

    coef: float = changing(ge=0, default=...)
    """Its weight."""
    estimator: Literal["k1", "k2", "k3", "unbiased"] = "k3"
    """`unbiased` is k3 times the ratio to the policy before the updates (DeepSeek-V3.2)."""
    where: Literal["loss", "reward"] = "loss"
    """Whether it is descended, or taken off the reward."""
    domains: dict[str, Weight] = changing({})
    """Factor on `coef` in a domain; 1 where none is given. DeepSeek-V3.2: near 0 for math."""
    reference_every: int | None = Field(None, gt=0)
    """The reference becomes the policy every so many steps (R1-Zero: 400)."""

    @model_validator(mode="after")
    def _estimator_works_there(self) -> Self:
        if self.where == "reward" and self.estimator == "unbiased":
            raise ValueError(
                "estimator = unbiased with where = reward: its ratio carries the gradient, and "
                "a reward has none; use where = loss, or k1, k2 or k3"
            )
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator = k1 with where = loss: the gradient of log(p/q) of a sampled token "
                "is zero in expectation, so this would regularise nothing; use where = reward, or "
                "k2 or k3"
            )
        return self


# Corrections: tokens of a sampler that differs from the learner (posttrain/rl/corrections.py).


class Truncated(Settings):
    """The importance ratio, at most `high`."""

    kind: Literal["truncated"] = tag("truncated")
    high: float = changing(5.0, ge=1)
    sequence: bool = False
    """The ratio of the whole response instead of the token's."""


class IcePop(Settings):
    """The importance ratio; tokens where it is outside [low, high] drop (arXiv 2601.02780)."""

    kind: Literal["icepop"] = tag("icepop")
    low: float = changing(0.5, ge=0, le=1)
    high: float = changing(5.0, ge=1)
    sequence: bool = False
    """The ratio of the whole response instead of the token's."""


Correction = Annotated[Truncated | IcePop, Field(discriminator="kind"), ByKind] | None
"""None for none."""


def correction_arguments(correction: Truncated | IcePop | None) -> dict[str, Any]:
    """A correction as the arguments of `posttrain.rl.corrections.importance_correction`."""
    if correction is None:
        return {"mode": "none", "low": 0.0, "high": 1.0}
    low = correction.low if isinstance(correction, IcePop) else 0.0
    mode = f"sequence_{correction.kind}" if correction.sequence else correction.kind
    return {"mode": mode, "low": low, "high": correction.high}


# Aggregation: how the losses of tokens become one number.


class TokenMean(Settings):
    """The mean over all tokens (DAPO, arXiv 2503.14476)."""

    kind: Literal["token"] = tag("token")


class SequenceMean(Settings):
    """The mean over rows of the mean over tokens (GRPO, arXiv 2402.03300)."""

    kind: Literal["sequence"] = tag("sequence")


class ConstantSum(Settings):
    """The mean over rows of sums over a constant: length does not rescale (Dr.GRPO)."""

    kind: Literal["constant"] = tag("constant")
    constant: int | None = Field(None, gt=0)
    """`max_new_tokens` if not given."""


Aggregation = Annotated[TokenMean | SequenceMean | ConstantSum, Field(discriminator="kind"), ByKind]


# How an rl stage draws its problems (posttrain/stages/problems.py).


class Reprofile(Settings):
    """When the policy is profiled anew within a stage, and how."""

    every: int | None = Field(None, gt=0)
    """Every so many steps."""
    on_plateau: int | None = Field(None, gt=0)
    """Where the mean reward of so many steps is less than 0.01 above that of as many before; both
    windows then start anew."""
    samples: int = Field(8, gt=0)
    """Responses per problem."""
    prompts: int = Field(256, gt=0)
    """Most problems per domain; the others keep the rate that they had."""


class _Repeats(BaseModel):
    """What every way of drawing has."""

    retire_above: float | None = changing(None, gt=0)
    """A problem whose last group had this mean reward or more is drawn no more, until all problems
    of its domain are retired (Olmo Hybrid: 0.875)."""
    dynamic_sampling: int = changing(0, ge=0, le=255)
    """Further draws per step until every group of the batch has unequal rewards (DAPO, arXiv
    2503.14476, 3.2)."""


class _Rates(BaseModel):
    """What a draw by pass rates has besides. It needs a profile."""

    update_rates: bool = False
    """The mean reward of a group becomes the problem's pass rate."""
    reprofile: Reprofile | None = None


class InTurn(Settings, _Repeats):
    """Each domain's problems in turn, none left out."""

    kind: Literal["in_turn"] = tag("in_turn")


class Band(Settings, _Repeats, _Rates):
    """Problems with a pass rate from `low` to `high`."""

    kind: Literal["band"] = tag("band")
    low: Share = changing(0.0)
    high: Share = changing(1.0)

    @model_validator(mode="after")
    def _is_a_band(self) -> Self:
        if self.low > self.high:
            raise ValueError(
                f"low = {self.low:g} is above high = {self.high:g}: no pass rate lies between them"
            )
        return self


class Gaussian(Settings, _Repeats, _Rates):
    """Problems in proportion to exp(-(rate - target)^2 / (2 spread^2)) (Nemotron 3 Nano)."""

    kind: Literal["gaussian"] = tag("gaussian")
    target: Share = changing(0.5)
    spread: float = changing(0.2, gt=0)


Draw = Annotated[InTurn | Band | Gaussian, Field(discriminator="kind"), ByKind]


class Critique(Settings):
    """The policy learns to judge, beside its rewards, from pairs of what it has just sampled, of
    which the verifier says which is better (the closed loop of Kimi K2, arXiv 2507.20534, 3.2)."""

    weight: float = changing(ge=0, default=...)
    """Of the mean cross-entropy of the verdicts."""
    pairs: int = changing(32, gt=0)
    """Most pairs per optimiser step."""
    domains: tuple[str, ...] = ()
    """Domains whose responses are compared; all of the stage's if none are given."""
