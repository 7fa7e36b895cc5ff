"""Settings of the stages that learn from given data: pretraining, supervised fine-tuning,
preferences and reward models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.algorithms import BradleyTerry, Dpo, Preference, RewardLoss
from posttrain.stages.settings.base import (
    Adapting,
    AuxLosses,
    Computing,
    Lengths,
    LongRows,
    Modes,
    Template,
    Training,
)
from posttrain.values import Settings, changing


class Pretrain(Settings, Computing, LongRows, Training):
    """A tiny model from nothing: `r.pretrain(data=...)`."""

    steps: int = Field(gt=0)
    batch_size: int = changing(128, gt=0)
    """Documents per step, drawn evenly over the domains unless `domain_shares` are given."""
    loss_on: Literal["all", "response"] = "all"
    """Learn every token of a document, or only those of its response."""
    hidden_size: int = Field(64, gt=0)
    num_layers: int = Field(3, gt=0)
    num_heads: int = Field(2, gt=0)
    head_dim: int = Field(32, gt=0)
    intermediate_size: int = Field(256, gt=0)
    max_positions: int = Field(128, gt=0)
    thinking: bool = False
    """Give the tokenizer `<think>` and `</think>` and the template `enable_thinking`. Follows from
    `modes`."""
    modes: Modes = ()
    aux: AuxLosses = Field(default_factory=dict)
    demo_noise: float = Field(0.0, ge=0, le=1)
    """Share of the demonstrations that are wrong, as a careless annotator writes them
    (`rewards/oracle.py`). Comes from the recipe's `noise`."""

    @property
    def thinks(self) -> bool:
        """Whether the model has modes: asked for, or needed by its demonstrations."""
        return self.thinking or bool(self.modes)


class Sft(Lengths, Settings, Computing, LongRows, Training, Adapting):
    """Supervised fine-tuning on demonstrations: `r.sft(start=..., data=...)`."""

    batch_size: int = changing(64, gt=0)
    modes: Modes = ()
    aux: AuxLosses = Field(default_factory=dict)
    loss_on: Literal["all", "last"] = "all"
    """Of a conversation learn all that the assistant says, or only its last message."""
    demo_noise: float = Field(0.0, ge=0, le=1)
    """Share of the demonstrations that are wrong, as a careless annotator writes them
    (`rewards/oracle.py`). Comes from the recipe's `noise`."""
    hint: Template | None = None
    """Template of a second prompt for every demonstration, beside its own. Comes from the recipe's
    `hint`."""


class DpoStage(Lengths, Settings, Computing, LongRows, Training, Adapting):
    """Learning from preferences: `r.dpo(start=..., data=r.pairs(...))`."""

    batch_size: int = changing(32, gt=0)
    """Pairs per step, drawn evenly over the domains unless `domain_shares` are given."""
    loss: Preference = Dpo()
    """What is descended; `SimPO` needs no reference."""
    mask_formatting: bool = False
    """Leave special tokens, the end of the turn among them, out of the preference loss."""
    aux: AuxLosses = Field(default_factory=dict)


class RewardModel(Lengths, Settings, Computing, LongRows, Training, Adapting):
    """A reward model from preference pairs: `r.reward_model(start=..., data=r.pairs(...))`."""

    batch_size: int = changing(32, gt=0)
    """Pairs per step, or prompts with `per_prompt`; evenly over the domains unless `domain_shares`
    are given."""
    loss: RewardLoss = BradleyTerry()
    per_prompt: bool = False
    """Draw prompts with all of their pairs, which count together as one (InstructGPT)."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts that is not learned from, and gives `heldout_accuracy`."""
