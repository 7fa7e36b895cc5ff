"""Algorithms as values: what a recipe passes where a stage has a choice.

    r.rl(..., surrogate=Cispo(clip_high=4), advantage=Gae(lam=0.95), kl=KL(0.02, estimator="k1",
         where="reward"), correction=IcePop(0.5, 5), draw=Gaussian(target=0.6))
    r.distill(..., estimator=TopK(64), balance=TokenShare())

Each is a frozen value with the settings that it reads and no others. Its name alone will do where
the defaults are wanted (`advantage="leave_one_out"`), numbers marked with `changing` may be given
as schedules, and `--set STAGE.surrogate.clip_high=0.28` reaches into it. `FUNCTION` names the code
that puts it into practice, which takes the settings by name; `custom("loss.py:sapo")` puts a
function of your own in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import digest
from posttrain.values import ByKind, Settings, changing, tag

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Ratio = Literal["token", "sequence", "product"]


class Custom(Settings):
    """A function of the user's own; made by `custom`. Its source text is its identity."""

    BY_GROUP: ClassVar[bool] = False
    """As an advantage it may set rows apart in any way, so none is left out before it is asked."""

    kind: Literal["custom"] = tag("custom")
    name: str
    """File and function, for messages: "loss.py:sapo"."""
    source: str
    """The text of the file."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""

    def implementation(self) -> Callable[..., Any]:
        """The user's function, from a module of its own that is made of the source text."""
        return _load(self.name, self.source)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that the recipe gave."""
        return dict(self.settings)


@cache
def _load(name: str, source: str) -> Callable[..., Any]:
    file, _, function = name.rpartition(":")
    # Named by the text, so that two versions of a file never meet under one name.
    module = ModuleType(f"posttrain_custom_{digest(source)[:16]}")
    # Dataclasses and pickle look their module up by name while the file is being executed.
    sys.modules[module.__name__] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return getattr(module, function)  # type: ignore[no-any-return]


def custom(place: str, **settings: Any) -> Custom:
    """A function of your own, `"file.py:function"`, as a surrogate, an advantage or a token weight.

    The path is relative to the file that calls this, else to the working directory. The text of
    the file becomes part of the stage's identity, so the file has to stand alone: it may import
    installed packages, not its neighbours. `settings` are passed on by name. What the function is
    given and has to return: `docs/language.md`, "Functions of your own".

    Raises ConfigError for a file that is missing or does not parse, or has no such function.
    """
    from posttrain.rewards.python_file import check_file

    file, _, function = place.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_absolute():
        beside = Path(sys._getframe(1).f_code.co_filename).parent / path
        path = beside if beside.is_file() else path
    if not file:
        raise ConfigError(f"custom({place!r}): write it as 'file.py:function'")
    check_file(path, function, where=f"custom({place!r})")
    source = path.read_text(encoding="utf-8")
    return Custom(name=f"{path.name}:{function}", source=source, settings=settings)


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


# Distillation: what is lowered between student and teacher (posttrain/losses/distill.py).


class SampledToken(Settings):
    """The teacher's log-ratio of the sampled token as a detached advantage (MiMo-V2-Flash)."""

    kind: Literal["sampled_token"] = tag("sampled_token")
    clip: float | None = changing(5.0, gt=0)
    """Bound on |log teacher - log student|."""


class TopK(Settings):
    """The reverse KL over the teacher's likeliest tokens of each position."""

    kind: Literal["top_k"] = tag("top_k")
    k: int = changing(64, gt=0)


class ReverseKL(Settings):
    """KL(student || teacher) over the whole vocabulary, exactly."""

    kind: Literal["reverse_kl"] = tag("reverse_kl")
    cache: Literal["float32", "bfloat16"] = "float32"
    """Type in which the teachers' hidden states are kept."""


class ForwardKL(Settings):
    """KL(teacher || student) over the whole vocabulary, exactly."""

    kind: Literal["forward_kl"] = tag("forward_kl")
    cache: Literal["float32", "bfloat16"] = "float32"
    """Type in which the teachers' hidden states are kept."""


class Jsd(Settings):
    """The generalised Jensen-Shannon divergence over the whole vocabulary, exactly."""

    kind: Literal["jsd"] = tag("jsd")
    beta: float = changing(0.5, gt=0, lt=1)
    """Near 0 it weighs like the forward KL, near 1 like the reverse KL."""
    cache: Literal["float32", "bfloat16"] = "float32"
    """Type in which the teachers' hidden states are kept."""


Estimator = Annotated[
    SampledToken | TopK | ReverseKL | ForwardKL | Jsd, Field(discriminator="kind"), ByKind
]


class Even(Settings):
    """Every row counts the same."""

    kind: Literal["even"] = tag("even")


class TokenShare(Settings):
    """A domain contributes its share of the prompts in tokens too (Open-MOPD, arXiv 2608.19098)."""

    kind: Literal["tokens"] = tag("tokens")


Balance = Annotated[Even | TokenShare, Field(discriminator="kind"), ByKind]


# Learning from preferences (posttrain/losses/preference.py, reward.py).


class Dpo(Settings):
    """Direct preference optimisation (arXiv 2305.18290)."""

    MEAN: ClassVar[bool] = False
    kind: Literal["dpo"] = tag("dpo")
    beta: float = changing(0.1, gt=0)
    """Reward per nat of the score."""
    label_smoothing: float = changing(0.0, ge=0, lt=0.5)
    """Share of pairs thought to be labelled the wrong way round."""
    nll_weight: float = changing(0.0, ge=0)
    """Weight of the cross-entropy of the chosen response. Llama 3: 0.2."""


class DpoNorm(Settings):
    """DPO on mean log-ratios per token (Tülu 3, arXiv 2411.15124)."""

    MEAN: ClassVar[bool] = True
    kind: Literal["dpo_norm"] = tag("dpo_norm")
    beta: float = changing(0.1, gt=0)
    """Reward per nat of the score. Tülu 3: 5."""
    label_smoothing: float = changing(0.0, ge=0, lt=0.5)
    nll_weight: float = changing(0.0, ge=0)


class SimPO(Settings):
    """Mean log-probabilities and a margin, without a reference (arXiv 2405.14734)."""

    MEAN: ClassVar[bool] = True
    kind: Literal["simpo"] = tag("simpo")
    beta: float = changing(0.1, gt=0)
    """Reward per nat of the score. SimPO: 2 to 2.5."""
    gamma: float = changing(0.5, ge=0)
    """Margin that is asked for between the rewards."""
    label_smoothing: float = changing(0.0, ge=0, lt=0.5)
    nll_weight: float = changing(0.0, ge=0)


class Ipo(Settings):
    """A squared loss onto a fixed margin (arXiv 2310.12036)."""

    MEAN: ClassVar[bool] = True
    kind: Literal["ipo"] = tag("ipo")
    beta: float = changing(0.1, gt=0)
    nll_weight: float = changing(0.0, ge=0)


class Kto(Settings):
    """Learns from each response by itself, as desirable or not (arXiv 2402.01306)."""

    MEAN: ClassVar[bool] = False
    kind: Literal["kto"] = tag("kto")
    beta: float = changing(0.1, gt=0)
    desirable_weight: float = changing(1.0, gt=0)
    undesirable_weight: float = changing(1.0, gt=0)
    """Weights of chosen and rejected responses."""


Preference = Annotated[Dpo | DpoNorm | SimPO | Ipo | Kto, Field(discriminator="kind"), ByKind]


class BradleyTerry(Settings):
    """By the difference of the two rewards of a pair."""

    kind: Literal["bradley_terry"] = tag("bradley_terry")
    margins: Literal["none", "strength"] = "none"
    """`strength` asks for a larger difference of clearer preferences (Llama 2)."""
    centring: float = changing(0.0, ge=0)
    """Weight of the squared sum of a pair's rewards, which pulls their mean to 0. 0.01 is usual."""


class Pointwise(Settings):
    """By each response as good or bad."""

    kind: Literal["pointwise"] = tag("pointwise")


RewardLoss = Annotated[BradleyTerry | Pointwise, Field(discriminator="kind"), ByKind]


# Optimisation.


class AdamW(Settings):
    """The optimiser of everything that learns."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    weight_decay: float = changing(0.0, ge=0)
    max_grad_norm: float = changing(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Share of the old average that each optimiser step keeps. The stage's model is then the moving
    average of its weights, which begins with the start. InstructGPT: 0.992."""


class CosineDecay(Settings):
    """The learning rate falls along half a cosine."""

    kind: Literal["cosine"] = tag("cosine")
    end: float = Field(0.05, ge=0, le=1)
    """Last learning rate as a share of `lr`."""


class LinearDecay(Settings):
    """The learning rate falls along a line."""

    kind: Literal["linear"] = tag("linear")
    end: float = Field(0.05, ge=0, le=1)
    """Last learning rate as a share of `lr`."""


class NoDecay(Settings):
    """The learning rate stays."""

    kind: Literal["constant"] = tag("constant")


Decay = Annotated[CosineDecay | LinearDecay | NoDecay, Field(discriminator="kind"), ByKind]


class Aux(Settings):
    """An auxiliary loss: cross-entropy on text of its own in every optimiser step of a stage."""

    weight: float = changing(ge=0, default=...)
    """Weight times the mean cross-entropy per token is added to the stage's mean loss."""
    batch_size: int = Field(32, gt=0)
    """Rows per optimiser step, drawn evenly over its domains."""
    modes: tuple[str, ...] = ()
    """Modes of its demonstrations; filled in by the recipe."""


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


# Choosing among rollouts (posttrain/stages/select.py, pairs.py).

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
