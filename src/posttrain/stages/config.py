"""Every stage's settings: what a recipe may write, checked when the recipe is built.

Kept apart from the stage loops so that planning a run imports neither torch nor transformers. A
setting is part of a stage's identity: change it and the stage runs again. Paths, threads and
devices are therefore not here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from posttrain.engine.errors import ConfigError

Positive = Field(gt=0)
Weight = Annotated[float, Field(ge=0)]


def _refuse_unread(config: BaseModel, *fields: str, because: str) -> None:
    """Raise ValueError for a setting that was changed and that nothing reads."""
    for name in fields:
        value, default = getattr(config, name), type(config).model_fields[name].default
        if value != default:
            raise ValueError(
                f"{name} = {value}: it is not read with {because}; leave it out, or change the "
                "other setting"
            )


def _steps_or_epochs(steps: int | None, epochs: float | None) -> None:
    if (steps is None) == (epochs is None):
        raise ValueError("give exactly one of steps and epochs")


class Config(BaseModel):
    """Base of the settings of stages that compute with models: an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = Field(0, ge=0, lt=2**31)
    """Every random choice of the stage follows from it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type in which models compute. Weights that are trained stay in float32, and so does every
    softmax of a loss."""


class Optimizer(BaseModel):
    """AdamW and its learning-rate schedule; mixed into the stages that train."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after warm-up; linear and cosine fall to `lr_end`."""
    lr_end: float = Field(0.05, ge=0, le=1)
    """Last learning rate as a share of `lr`."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear rise from 0 to `lr`; at most half of the stage."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""

    @model_validator(mode="after")
    def _lr_end_is_read(self) -> Self:
        if self.lr_schedule == "constant":
            _refuse_unread(self, "lr_end", because="lr_schedule = constant")
        return self


class Pretrain(Config, Optimizer):
    """A tiny model from nothing: `r.pretrain(data=...)`."""

    steps: int = Positive
    batch_size: int = Field(128, gt=0)
    """Documents per step, drawn evenly over the domains."""
    loss_on: Literal["all", "response"] = "all"
    """Learn every token of a document, or only those of its response."""
    hidden_size: int = Field(64, gt=0)
    num_layers: int = Field(3, gt=0)
    num_heads: int = Field(2, gt=0)
    head_dim: int = Field(32, gt=0)
    intermediate_size: int = Field(256, gt=0)
    max_positions: int = Field(128, gt=0)


class Sft(Config, Optimizer):
    """Supervised fine-tuning on demonstrations: `r.sft(start=..., data=...)`."""

    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    """Passes over the data; give this or `steps`."""
    batch_size: int = Field(64, gt=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        _steps_or_epochs(self.steps, self.epochs)
        return self


class Dpo(Config, Optimizer):
    """Learning from preferences: `r.dpo(start=..., data=r.pairs(...))`."""

    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    """Passes over the pairs; give this or `steps`."""
    batch_size: int = Field(32, gt=0)
    """Pairs per step, drawn evenly over the domains."""
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
        _steps_or_epochs(self.steps, self.epochs)
        return self

    @model_validator(mode="after")
    def _loss_reads(self) -> Self:
        because = f"loss = {self.loss}"
        if self.loss != "simpo":
            _refuse_unread(self, "gamma", because=because)
        if self.loss in ("ipo", "kto"):
            _refuse_unread(self, "label_smoothing", because=because)
        if self.loss == "kto":
            _refuse_unread(self, "nll_weight", because=because)
        else:
            _refuse_unread(self, "desirable_weight", "undesirable_weight", because=because)
        return self


class Correction(BaseModel):
    """Importance correction between the policy that sampled and the one that learns."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    correction: Literal["none", "truncated", "icepop"] = "none"
    """`truncated`: min(ratio, high). `icepop`: tokens whose ratio is outside [low, high] drop."""
    correction_low: float = Field(0.5, ge=0, le=1)
    correction_high: float = Field(5.0, ge=1)

    @model_validator(mode="after")
    def _bounds_are_read(self) -> Self:
        if self.correction != "icepop":
            _refuse_unread(self, "correction_low", because=f"correction = {self.correction}")
        if self.correction == "none":
            _refuse_unread(self, "correction_high", because="correction = none")
        return self


class Aggregation(BaseModel):
    """How the losses of tokens are averaged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over tokens, over rows of row means, or over rows of sums divided by a constant."""
    aggregation_constant: int | None = Field(None, gt=0)
    """The constant; `max_new_tokens` if not given."""

    @model_validator(mode="after")
    def _constant_is_read(self) -> Self:
        if self.aggregation != "constant":
            _refuse_unread(
                self, "aggregation_constant", because=f"aggregation = {self.aggregation}"
            )
        return self


class Rollout(BaseModel):
    """How a stage samples."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, gt=0)
    updates_per_batch: int = Field(1, gt=0)
    """Optimiser steps per batch of rollouts, each on an equal share of its rows."""


class Rl(Config, Optimizer, Rollout, Correction, Aggregation):
    """GRPO and its relatives on verifiable rewards: `r.rl(start=..., prompts=...)`."""

    steps: int = Positive
    prompts_per_step: int = Field(32, gt=0)
    group_size: int = Field(8, gt=1)
    """Responses per prompt."""
    advantage: Literal["group_mean", "group_zscore", "leave_one_out", "batch"] = "group_zscore"
    ratio: Literal["token", "sequence"] = "token"
    """`sequence` is GSPO's geometric mean over the response."""
    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.2, gt=0)
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the stage's start; 0 loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    drop_zero_variance: bool = True
    """Leave out groups whose rewards are all alike: they carry no gradient. With a KL penalty in
    the loss they do, and stay."""

    @model_validator(mode="after")
    def _ratio_is_read(self) -> Self:
        if self.updates_per_batch == 1:
            because = "updates_per_batch = 1 (the ratio is then exactly 1)"
            _refuse_unread(self, "clip_low", "clip_high", because=because)
            if self.correction == "none":
                _refuse_unread(self, "ratio", because=because)
        return self

    @model_validator(mode="after")
    def _kl_is_read(self) -> Self:
        if self.kl_coef == 0:
            _refuse_unread(self, "kl_estimator", "kl_in", because="kl_coef = 0")
        return self

    @model_validator(mode="after")
    def _k1_is_a_reward(self) -> Self:
        if self.kl_coef > 0 and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator = k1 with kl_in = loss: the gradient of log(p/q) of a sampled token "
                "is zero in expectation, so this would regularise nothing; use kl_in = reward, or "
                "k2 or k3"
            )
        return self


class Distill(Config, Optimizer, Rollout, Correction, Aggregation):
    """On-policy distillation from one teacher per domain: `r.distill(start=..., teachers=...)`."""

    steps: int = Positive
    prompts_per_step: int = Field(256, gt=0)
    """Drawn evenly over the domains."""
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
    routes: dict[str, str] = Field(default_factory=dict)
    """Domain to teacher; filled in by the recipe."""

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

    @model_validator(mode="after")
    def _estimator_reads(self) -> Self:
        if self.estimator != "top_k":
            _refuse_unread(self, "top_k", because=f"estimator = {self.estimator}")
        if self.estimator != "sampled_token":
            _refuse_unread(self, "advantage_clip", because=f"estimator = {self.estimator}")
        if self.estimator != "full_vocabulary":
            because = f"estimator = {self.estimator}"
            _refuse_unread(self, "divergence", "teacher_cache", because=because)
        if self.divergence != "jsd":
            _refuse_unread(self, "jsd_beta", because=f"divergence = {self.divergence}")
        if self.precision != "float32":
            _refuse_unread(self, "teacher_cache", because=f"precision = {self.precision}")
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
        unknown = [name for name in self.domain_weights if name not in self.routes]
        if unknown and self.routes:
            raise ValueError(
                f"domain_weights: {unknown[0]!r} is not a domain of its prompts; choices: "
                f"{', '.join(self.routes)}"
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


class Evaluate(Config):
    """Accuracy of several models on problems that no training stage can draw from."""

    split: Literal["heldout", "validation"] = "heldout"
    num_problems: int = Field(400, gt=1)
    """Per domain; fewer if the split has fewer."""
    samples: int = Field(2, gt=0)
    """Responses per problem at temperature 1, besides one greedy response."""
    max_new_tokens: int = Field(64, gt=0)
    bootstrap: int = Field(2000, ge=100)
    """Resamples of the problems behind each 95 % interval."""
    transcripts: int = Field(6, ge=0)
    """Problems per domain whose responses are kept for the report."""
    routes: dict[str, str] = Field(default_factory=dict)
    """Domain to teacher; filled in by the recipe."""


class Sample(Config):
    """Responses of one or more models, scored by the domain's verifier."""

    k: int = Field(4, gt=0)
    """Responses per prompt."""
    num_prompts: int = Field(1000, gt=0)
    """Prompts per domain, from the training split."""
    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, ge=0)
    routes: dict[str, str] = Field(default_factory=dict)
    """Domain to the model that samples it; filled in by the recipe."""


class Select(BaseModel):
    """Rollouts to imitate: `r.select(rollouts, how="correct")`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    how: Literal["correct", "best", "shortest_correct"] = "correct"
    """All with full reward, those that tie for the prompt's best reward above 0, or the shortest
    with full reward."""
    max_per_prompt: int = Field(4, gt=0)

    @model_validator(mode="after")
    def _number_is_read(self) -> Self:
        if self.how == "shortest_correct":
            _refuse_unread(self, "max_per_prompt", because="how = shortest_correct")
        return self


class Pairs(BaseModel):
    """Preference pairs out of rollouts: `r.pairs(rollouts)`, `r.pairs(strong, against=weak)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    how: Literal["best_against_worst", "strong_against_weak"] = "best_against_worst"
    """By reward among the responses of one stage, or by which of two stages a response is from."""
    max_per_prompt: int = Field(1, gt=0)
    """The n-th best goes against the n-th worst, or the strong stage's n-th with the weak one's."""
    min_margin: float | None = Field(None, gt=0, le=1)
    """Least reward of the chosen response minus that of the rejected one. Without it any
    difference will do for best_against_worst, and rewards are not looked at otherwise."""
    min_chosen_reward: float | None = Field(None, gt=0, le=1)
    """Least reward of the chosen response."""
    max_length_gap: int | None = Field(None, ge=0)
    """Most characters by which the two responses may differ in length."""


class DomainData(BaseModel):
    """A domain's problems; its settings come from the suite, not from a recipe."""

    model_config = ConfigDict(frozen=True, extra="allow")


class ExternalModel(BaseModel):
    """A checkpoint from outside; its identity is the bytes of its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")


CONFIGS: dict[str, type[BaseModel]] = {
    "domain": DomainData,
    "model": ExternalModel,
    "pretrain": Pretrain,
    "sft": Sft,
    "dpo": Dpo,
    "rl": Rl,
    "distill": Distill,
    "evaluate": Evaluate,
    "sample": Sample,
    "select": Select,
    "pairs": Pairs,
}

# Raised by hand when a change makes a stage give other numbers for the same settings.
VERSIONS: dict[str, int] = dict.fromkeys(CONFIGS, 1)


def build_config(kind: str, stage: str, values: Mapping[str, Any]) -> BaseModel:
    """The checked settings of a stage; ConfigError names stage, field, value and choices."""
    config = CONFIGS[kind]
    try:
        return config(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error, config, kind, stage)) from None


def _explain(error: ValidationError, config: type[BaseModel], kind: str, stage: str) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(map(str, problem["loc"]))
        where = f"stage {stage!r} ({kind})" + (f", field {field!r}" if field else "")
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, config.model_fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            choices = ", ".join(config.model_fields)
            lines.append(f"{where}: unknown option; {hint}choices: {choices}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: a value is needed, for example {field}=100")
        elif problem["type"] == "value_error":
            lines.append(f"{where}: {problem['ctx']['error']}")
        else:
            lines.append(f"{where}: {problem['input']!r} is not allowed: {problem['msg']}")
    return "\n".join(lines)
