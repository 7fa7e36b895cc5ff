"""Settings of on-policy distillation."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.algorithms import (
    Aggregation,
    Balance,
    Correction,
    Estimator,
    Even,
    ReverseKL,
    SampledToken,
    SequenceMean,
)
from posttrain.stages.settings.base import (
    Adapting,
    AuxLosses,
    Computing,
    LongRows,
    Modes,
    Rollouts,
    Template,
    Training,
    Weight,
)
from posttrain.values import Settings, changing


def _no_k1_loss(value: Any) -> Any:
    if value in ("k1", "k1_loss"):
        raise ValueError(
            f"estimator = {value}: log(student / teacher) of sampled tokens, back-propagated "
            "as a loss, has zero gradient in expectation and would teach nothing; use "
            "sampled_token, where it is a detached advantage, or top_k or reverse_kl"
        )
    return value


class Distill(Settings, Computing, LongRows, Training, Rollouts, Adapting):
    """On-policy distillation from one teacher per domain: `r.distill(start=..., teachers=...)`."""

    steps: int = Field(gt=0)
    prompts_per_step: int = changing(256, gt=0)
    """Drawn evenly over the domains unless `domain_shares` are given."""
    samples_per_prompt: int = changing(1, gt=0)
    modes: Modes = ()
    estimator: Annotated[Estimator, BeforeValidator(_no_k1_loss)] = ReverseKL()
    """What is lowered between student and teacher, and how it is estimated."""
    reward_weight: float = changing(0.0, ge=0)
    """Weight of the group-mean advantage of the verifiable reward; 0 calls no verifier."""
    correction: Correction = None
    """For what differs between the policy that sampled and the one that learns."""
    aggregation: Aggregation = SequenceMean()
    balance: Balance = Even()
    """How domains of unlike length weigh against each other."""
    domain_weights: dict[str, Weight] = changing({})
    """Weight of a domain's loss; 1 where none is given."""
    aux: AuxLosses = Field(default_factory=dict)
    hints: dict[str, Template] = Field(default_factory=dict)
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
    def LOGS_ALL(self) -> bool:
        """A step in which no row is learned from logs nothing of an update."""
        return not self.mask_unfinished

    @property
    def rewarded(self) -> bool:
        """Whether the verifiable reward has a weight above 0 at some step."""
        return any(weight > 0 for weight in self.possible("reward_weight"))

    @model_validator(mode="after")
    def _correction_has_a_policy_gradient(self) -> Self:
        policy_gradient = isinstance(self.estimator, SampledToken) or self.reward_weight > 0
        if self.correction is not None and not policy_gradient:
            raise ValueError(
                f"correction = {self.correction.kind} with estimator = {self.estimator.kind}: an "
                "exact divergence does not depend on which token was sampled, so there is nothing "
                "to correct; use estimator = sampled_token or leave the correction out"
            )
        if self.num_minibatches > 1 and policy_gradient and self.correction is None:
            raise ValueError(
                f"num_minibatches = {self.num_minibatches} with a policy gradient (estimator = "
                f"{self.estimator.kind}, reward_weight = {self.reward_weight}): after the first "
                "update the tokens are no longer the student's own; set correction = truncated or "
                "icepop, or num_minibatches = 1"
            )
        return self

    @model_validator(mode="after")
    def _something_is_left_out(self) -> Self:
        if self.per_kept and not self.mask_unfinished:
            raise ValueError(
                "per_kept = true with mask_unfinished = false: no row is left out, so there is "
                "nothing to choose; set mask_unfinished, or leave per_kept out"
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
