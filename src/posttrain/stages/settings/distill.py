"""Settings of on-policy distillation."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from posttrain.hints import check_hint
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
from posttrain.stages.settings.scheduled import Config, refuse_unread


class Distill(Config, Optimizer, DomainShares, InModes, WithAux, Rollout, Correction, Aggregation):
    """On-policy distillation from one teacher per domain: `r.distill(start=..., teachers=...)`."""

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset(
        {
            "prompts_per_step",
            "samples_per_prompt",
            "jsd_beta",
            "top_k",
            "advantage_clip",
            "reward_weight",
            "domain_weights",
        }
    )

    steps: int = Positive
    prompts_per_step: int = Field(256, gt=0)
    """Drawn evenly over the domains unless `domain_shares` are given."""
    samples_per_prompt: int = Field(1, gt=0)
    estimator: Literal["sampled_token", "top_k", "full_vocabulary"] = "full_vocabulary"
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """What is lowered, of student p and teacher t: KL(p || t), KL(t || p) or the generalised JSD;
    used by estimator full_vocabulary only."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """Near 0 the JSD weighs like the forward KL, near 1 like the reverse KL; used by divergence jsd
    only."""
    teacher_cache: Literal["float32", "bfloat16"] = "float32"
    """Type in which the teachers' hidden states are kept; used by estimator full_vocabulary
    only."""
    top_k: int = Field(64, gt=0)
    """Teacher tokens per position; used by estimator top_k only."""
    advantage_clip: float | None = Field(5.0, gt=0)
    """Bound on |log teacher - log student|; used by estimator sampled_token only."""
    reward_weight: float = Field(0.0, ge=0)
    """Weight of the group-mean advantage of the verifiable reward; 0 calls no verifier."""
    aggregation: Literal["token", "sequence", "constant"] = "sequence"
    balance: Literal["none", "tokens"] = "none"
    """`tokens` weighs domains so that each contributes its share of prompts in tokens too."""
    domain_weights: dict[str, Weight] = Field(default_factory=dict)
    """Weight of a domain's loss; 1 where none is given."""
    hints: dict[str, str] = Field(default_factory=dict)
    """Domain to a template of the prompt, such as "{prompt} {answer}": its teacher reads the
    responses after that instead of the prompt that the student saw."""
    routes: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Domain, or domain/mode, to its teacher or to several; filled in by the recipe."""

    def teachers_of(self, domain: str, mode: str | None = None) -> tuple[str, ...]:
        """The teachers of a domain's prompts in a mode; they take them in turn."""
        names = self.routes[f"{domain}/{mode}" if f"{domain}/{mode}" in self.routes else domain]
        return (names,) if isinstance(names, str) else names

    @property
    def teachers(self) -> list[str]:
        """The names of all teachers, sorted."""
        every = [(names,) if isinstance(names, str) else names for names in self.routes.values()]
        return sorted({name for names in every for name in names})

    @property
    def rewarded(self) -> bool:
        """Whether the verifiable reward has a weight above 0 at some step."""
        return any(weight > 0 for weight in self.possible("reward_weight"))

    @field_validator("estimator", mode="before")
    @classmethod
    def _estimator_is_no_k1_loss(cls, value: object) -> object:
        if value in ("k1", "k1_loss"):
            raise ValueError(
                f"estimator = {value}: log(student / teacher) of sampled tokens, back-propagated "
                "as a loss, has zero gradient in expectation and would teach nothing; use "
                "sampled_token, where it is a detached advantage, or top_k or full_vocabulary"
            )
        return value

    @field_validator("hints")
    @classmethod
    def _hints_are_templates(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: check_hint(template) for name, template in value.items()}

    @model_validator(mode="after")
    def _estimator_reads(self) -> Self:
        if self.estimator != "top_k":
            refuse_unread(self, "top_k", because=f"estimator = {self.estimator}")
        if self.estimator != "sampled_token":
            refuse_unread(self, "advantage_clip", because=f"estimator = {self.estimator}")
        if self.estimator != "full_vocabulary":
            because = f"estimator = {self.estimator}"
            refuse_unread(self, "divergence", "teacher_cache", because=because)
        if self.divergence != "jsd":
            refuse_unread(self, "jsd_beta", because=f"divergence = {self.divergence}")
        if self.precision != "float32":
            refuse_unread(self, "teacher_cache", because=f"precision = {self.precision}")
        return self

    @model_validator(mode="after")
    def _correction_has_a_policy_gradient(self) -> Self:
        policy_gradient = self.estimator == "sampled_token" or self.reward_weight > 0
        if self.correction != "none" and not policy_gradient:
            raise ValueError(
                f"correction = {self.correction} with estimator = {self.estimator}: an exact "
                "divergence does not depend on which token was sampled, so there is nothing to "
                "correct; use estimator = sampled_token or correction = none"
            )
        if self.updates_per_batch > 1 and policy_gradient and self.correction == "none":
            raise ValueError(
                f"updates_per_batch = {self.updates_per_batch} with a policy gradient (estimator = "
                f"{self.estimator}, reward_weight = {self.reward_weight}): after the first update "
                "the tokens are no longer the student's own; set correction = truncated or icepop, "
                "or updates_per_batch = 1"
            )
        return self

    @model_validator(mode="after")
    def _weights_name_domains(self) -> Self:
        domains = dict.fromkeys(route.partition("/")[0] for route in self.routes)
        unknown = [name for name in self.domain_weights if name not in domains]
        if unknown and self.routes:
            raise ValueError(
                f"domain_weights: {unknown[0]!r} is not a domain of its prompts; choices: "
                f"{', '.join(domains)}"
            )
        return self

    @model_validator(mode="after")
    def _reward_needs_groups(self) -> Self:
        if self.reward_weight > 0 and self.samples_per_prompt < 2:
            raise ValueError(
                f"reward_weight = {self.reward_weight} with samples_per_prompt = 1: the reward's "
                "advantage is relative to the other samples of a prompt; set samples_per_prompt "
                "to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _balance_needs_token_means(self) -> Self:
        if self.balance == "tokens" and self.aggregation != "token":
            raise ValueError(
                f"balance = tokens with aggregation = {self.aggregation}: rows are already "
                "averaged before they are added up, so no domain gains by its length; set "
                "aggregation = token or balance = none"
            )
        return self
