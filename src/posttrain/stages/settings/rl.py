"""Settings of reinforcement learning."""

from __future__ import annotations

from string import Formatter
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from posttrain.rewards.judge_kinds import Judge, JudgeSetting, Verifier, check_use
from posttrain.stages.settings.base import (
    Aggregation,
    Correction,
    DomainShares,
    InModes,
    Optimizer,
    Positive,
    Rollout,
    Weight,
    WithAux,
)
from posttrain.stages.settings.rl_critique import Critiquing
from posttrain.stages.settings.rl_drawing import (
    Drawing,
    check_band,
)
from posttrain.stages.settings.scheduled import Config, refuse_unread


class Rl(
    Config,
    Optimizer,
    DomainShares,
    InModes,
    WithAux,
    Rollout,
    Correction,
    Aggregation,
    Drawing,
    Critiquing,
):
    """GRPO and its relatives on verifiable rewards: `r.rl(start=..., prompts=...)`."""

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset(
        {
            "prompts_per_step",
            "group_size",
            "top_p",
            "kl_coef",
            "domain_kl",
            "clip_low",
            "clip_high",
            "dual_clip",
            "tau",
            "off_policy_delta",
            "critic_lr",
            "gae_lambda",
            "gae_gamma",
            "value_clip",
        }
    )
    LOGS_ALL: ClassVar[bool] = False
    """A step in which no row is kept logs nothing of an update."""

    steps: int = Positive
    reward: JudgeSetting = Field(default_factory=Verifier)
    """The judge whose scores are the reward (`posttrain.judges`), in its JSON form."""
    prompts_per_step: int = Field(32, gt=0)
    group_size: int = Field(8, gt=0)
    """Responses per prompt; 2 or more where an advantage is relative to the group."""
    segments: int = Field(1, gt=0)
    """Responses one after another that make a rollout: each is asked with the one before it, the
    last one is judged, and all of them get the advantage of the chain (Composer 2)."""
    chain: str = "{prompt} {response}"
    """With `segments`: the next prompt, from the problem's own and the response before."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Tokens are drawn from the likeliest ones that have this probability together."""
    replay_mask: bool = True
    """With `top_p`: policy, policy before the updates and reference have their log-probs over the
    tokens that could be drawn, as the sampler had (Keep Sampling Mask, DeepSeek-V3.2)."""
    advantage: Literal["group_mean", "group_zscore", "leave_one_out", "batch", "global", "gae"] = (
        "group_zscore"
    )
    """`global` is over the whole batch (REINFORCE++), `gae` of each token by a critic (PPO), the
    others within the group of a prompt."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """0 trusts the critic alone, 1 the rewards alone."""
    gae_gamma: float = Field(1.0, ge=0, le=1)
    """Discount of a reward per token."""
    critic_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the critic, over the steps as the policy's; `lr` if not given."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far a value may move in the updates on one batch; None for no bound."""
    critic_warmup_steps: int = Field(0, ge=0)
    """Steps at the beginning in which only the critic learns."""
    surrogate: Literal["clip", "cispo", "geometric_mean", "squared"] = "clip"
    """`clip` is PPO's and GRPO's. `cispo` clips the weight and keeps every gradient.
    `geometric_mean` is GMPO, its clips are of log ratios. `squared` is Kimi's."""
    ratio: Literal["token", "sequence", "product"] = "token"
    """`sequence` is GSPO's geometric mean over the response, `product` the response's own."""
    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the loss of a negative advantage, in multiples of it."""
    tau: float = Field(1.0, gt=0)
    """Strength of the pull to the policy before the updates in `squared`."""
    off_policy_delta: float | None = Field(None, ge=0)
    """Responses with a negative advantage drop where the policy has moved away from them by more
    nats per token (DeepSeek-V3.2)."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the stage's start; 0 loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3", "unbiased"] = "k3"
    """`unbiased` is k3 times the ratio to the policy before the updates (DeepSeek-V3.2)."""
    kl_in: Literal["loss", "reward"] = "loss"
    domain_kl: dict[str, Weight] = Field(default_factory=dict)
    """Factor on `kl_coef` in a domain; 1 where none is given. DeepSeek-V3.2: near 0 for math."""
    reference_every: int | None = Field(None, gt=0)
    """The reference becomes the policy every so many steps (R1-Zero: 400)."""
    mask_unfinished: bool = False
    """Leave responses that were cut at the length limit out of the loss (DAPO's overlong
    filtering)."""
    drop_zero_variance: bool = True
    """Leave out groups whose rewards are all alike: they carry no gradient. With a KL penalty in
    the loss they do, and stay."""

    @field_validator("reward")
    @classmethod
    def _rl_can_ask_it(cls, judge: Judge) -> Judge:
        check_use(judge, "rl", where="reward")
        return judge

    @field_validator("chain")
    @classmethod
    def _chain_is_a_template(cls, value: str) -> str:
        try:
            parts = list(Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"{value!r} is no template ({error}); write {{{{ for {{") from None
        names = [name for _, name, _, _ in parts if name is not None]
        plain = not any(spec or conversion for _, _, spec, conversion in parts)
        if not plain or not set(names) <= {"prompt", "response"} or "response" not in names:
            raise ValueError(
                f"{value!r} is no template for the next prompt; it takes {{response}}, which must "
                "be there, and {prompt}, and nothing else in braces"
            )
        return value

    @property
    def rows_per_prompt(self) -> int:
        """Adjacent rows of a batch that answer one prompt."""
        return self.group_size * self.segments

    @property
    def verified_only(self) -> bool:
        """Whether the reward is the verifier's score and nothing else."""
        return isinstance(self.reward, Verifier)

    @property
    def uses_reference(self) -> bool:
        """Whether any step has a KL penalty."""
        return self.kl_coef > 0 or "kl_coef" in self.schedules

    @property
    def uses_critique(self) -> bool:
        """Whether the policy learns to judge its own responses at any step."""
        return self.critique_weight > 0 or "critique_weight" in self.schedules

    @property
    def by_group(self) -> bool:
        """Whether an advantage is relative to the other responses to its prompt."""
        return self.advantage not in ("global", "gae")

    @property
    def uses_critic(self) -> bool:
        """Whether advantages come from a critic."""
        return self.advantage == "gae"

    @model_validator(mode="after")
    def _groups_are_groups(self) -> Self:
        if self.by_group and self.group_size < 2:
            raise ValueError(
                f"group_size = {self.group_size} with advantage = {self.advantage}: a response has "
                "no other to differ from; set group_size to 2 or more, or advantage = global"
            )
        if not self.by_group:
            names = ("drop_zero_variance", "dynamic_sampling")
            refuse_unread(self, *names, because=f"advantage = {self.advantage}")
        return self

    @model_validator(mode="after")
    def _draws_are_possible(self) -> Self:
        check_band(self, self.schedules, self.steps)
        return self

    @model_validator(mode="after")
    def _critic_is_read(self) -> Self:
        if not self.uses_critic:
            names = ("gae_lambda", "gae_gamma", "critic_lr", "value_clip", "critic_warmup_steps")
            refuse_unread(self, *names, because=f"advantage = {self.advantage}")
        elif self.updates_per_batch == 1:
            because = "updates_per_batch = 1 (a value has not moved before its only update)"
            refuse_unread(self, "value_clip", because=because)
        if self.critic_warmup_steps >= self.steps:
            raise ValueError(
                f"critic_warmup_steps = {self.critic_warmup_steps} with steps = {self.steps}: the "
                "policy would never learn; leave it steps of its own"
            )
        return self

    @model_validator(mode="after")
    def _ratio_is_read(self) -> Self:
        if self.updates_per_batch == 1:
            because = "updates_per_batch = 1 (the ratio is then exactly 1)"
            names = ("clip_low", "clip_high", "dual_clip", "tau", "off_policy_delta")
            refuse_unread(self, *names, because=because)
            if self.correction == "none":
                refuse_unread(self, "ratio", because=because)
        return self

    @model_validator(mode="after")
    def _surrogate_reads(self) -> Self:
        because = f"surrogate = {self.surrogate}"
        if self.surrogate != "squared":
            refuse_unread(self, "tau", because=because)
        if self.surrogate == "squared":
            refuse_unread(self, "clip_low", "clip_high", because=because)
        if self.surrogate in ("squared", "geometric_mean"):
            refuse_unread(self, "ratio", because=because)
        if self.surrogate != "clip":
            refuse_unread(self, "dual_clip", because=because)
        return self

    @model_validator(mode="after")
    def _kl_is_read(self) -> Self:
        if not self.uses_reference:
            names = ("kl_estimator", "kl_in", "domain_kl", "reference_every")
            refuse_unread(self, *names, because="kl_coef = 0")
        return self

    @model_validator(mode="after")
    def _chains_are_read(self) -> Self:
        if self.segments == 1:
            refuse_unread(self, "chain", because="segments = 1")
        elif self.uses_critique:
            raise ValueError(
                f"segments = {self.segments} with a critique_weight: its segments answer different "
                "prompts, so there is no one question to compare them on; leave "
                "critique_weight out"
            )
        elif self.uses_critic:
            raise ValueError(
                f"segments = {self.segments} with advantage = gae: a critic values one response "
                "and knows nothing of the segments that follow; use another advantage"
            )
        return self

    @model_validator(mode="after")
    def _critique_is_read(self) -> Self:
        if not self.uses_critique:
            names = ("critique_pairs", "critique_domains")
            refuse_unread(self, *names, because="critique_weight = 0")
        return self

    @model_validator(mode="after")
    def _mask_is_read(self) -> Self:
        if self.top_p == 1 and "top_p" not in self.schedules:
            refuse_unread(self, "replay_mask", because="top_p = 1")
        elif not self.replay_mask and self.uses_reference and self.kl_in == "reward":
            raise ValueError(
                "replay_mask = False with kl_in = reward: the sampler's log-probs are over the "
                "nucleus and the reference's over the vocabulary, so their difference is no KL "
                "divergence; leave replay_mask out, or use kl_in = loss"
            )
        return self

    @model_validator(mode="after")
    def _k1_is_a_reward(self) -> Self:
        if self.kl_in == "reward" and self.kl_estimator == "unbiased":
            raise ValueError(
                "kl_estimator = unbiased with kl_in = reward: its ratio carries the gradient, and "
                "a reward has none; use kl_in = loss, or k1, k2 or k3"
            )
        if self.kl_coef > 0 and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator = k1 with kl_in = loss: the gradient of log(p/q) of a sampled token "
                "is zero in expectation, so this would regularise nothing; use kl_in = reward, or "
                "k2 or k3"
            )
        return self
