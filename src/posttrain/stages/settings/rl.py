"""Settings of reinforcement learning."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from posttrain.algorithms import (
    KL,
    Advantage,
    Clip,
    Correction,
    Critique,
    Custom,
    Draw,
    Gae,
    GroupZScore,
    InTurn,
    Surrogate,
)
from posttrain.rewards.judge_kinds import Judge, JudgeSetting, Verifier, check_use
from posttrain.stages.settings.base import (
    Adapting,
    AuxLosses,
    Computing,
    LongRows,
    Modes,
    Rollouts,
    Training,
)
from posttrain.values import Settings, changing


class Rl(Settings, Computing, LongRows, Training, Rollouts, Adapting):
    """GRPO, PPO and their relatives on any reward: `r.rl(start=..., prompts=...)`."""

    LOGS_ALL: ClassVar[bool] = False
    """A step in which no row is trained on logs nothing of an update."""

    steps: int = Field(gt=0)
    reward: JudgeSetting = Field(default_factory=Verifier)
    """The judge whose scores are the reward (`posttrain.judges`)."""
    prompts_per_step: int = changing(32, gt=0)
    group_size: int = changing(8, gt=0)
    """Responses per prompt; 2 or more where an advantage is relative to the group."""
    modes: Modes = ()
    top_p: float = changing(1.0, gt=0, le=1)
    """Tokens are drawn from the likeliest ones that have this probability together."""
    replay_mask: bool = True
    """With `top_p`: policy, policy before the updates and reference have their log-probs over the
    tokens that could be drawn, as the sampler had (Keep Sampling Mask, DeepSeek-V3.2)."""
    draw: Draw = InTurn()
    """Which problems a step uses."""
    advantage: Advantage = GroupZScore()
    """What each response, or each of its tokens, is credited with."""
    surrogate: Surrogate = Clip()
    """What a policy-gradient step descends."""
    token_weight: Custom | None = None
    """A function of your own that weighs the tokens of the surrogate."""
    correction: Correction = None
    """For what differs between the policy that sampled and the one that learns."""
    off_policy_delta: float | None = changing(None, ge=0)
    """Responses with a negative advantage drop where the policy has moved away from them by more
    nats per token (DeepSeek-V3.2)."""
    kl: KL | None = None
    """Holds the policy to its start; None loads no reference."""
    critique: Critique | None = None
    """Learning to judge from the step's own responses."""
    aux: AuxLosses = Field(default_factory=dict)
    drop_zero_variance: bool = True
    """Leave out groups whose rewards are all alike: they carry no gradient, and this saves
    computing it. Where they do carry one (a KL penalty, say) they stay."""

    @field_validator("reward")
    @classmethod
    def _rl_can_ask_it(cls, judge: Judge) -> Judge:
        check_use(judge, "rl", where="reward")
        return judge

    @property
    def verified_only(self) -> bool:
        """Whether the reward is the verifier's score and nothing else."""
        return isinstance(self.reward, Verifier)

    @property
    def by_group(self) -> bool:
        """Whether an advantage is relative to the other responses to its prompt."""
        return self.advantage.BY_GROUP

    @property
    def uses_critic(self) -> bool:
        """Whether advantages come from a critic."""
        return isinstance(self.advantage, Gae)

    @model_validator(mode="after")
    def _something_is_left_out(self) -> Self:
        if self.per_kept and not (self.drop_zero_variance or self.mask_unfinished):
            raise ValueError(
                "per_kept = true with drop_zero_variance = false and mask_unfinished = false: no "
                "row is left out, so there is nothing to choose; set one of them, or leave "
                "per_kept out"
            )
        return self

    @model_validator(mode="after")
    def _policy_learns(self) -> Self:
        if isinstance(self.advantage, Gae) and self.advantage.warmup_steps >= self.steps:
            raise ValueError(
                f"advantage.warmup_steps = {self.advantage.warmup_steps} with steps = {self.steps}:"
                " only the critic learns in these steps, and the policy would stay as it is; give "
                "fewer warmup_steps than steps"
            )
        return self

    @model_validator(mode="after")
    def _groups_are_groups(self) -> Self:
        if self.by_group and self.group_size < 2:
            raise ValueError(
                f"group_size = {self.group_size} with advantage = {self.advantage.kind}: a "
                "response has no other to differ from; set group_size to 2 or more, or advantage "
                "= global"
            )
        return self
