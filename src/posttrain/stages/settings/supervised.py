"""Settings of the stages that learn from given text: pretraining and supervised fine-tuning."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from posttrain.backends.prompting import check_hint
from posttrain.stages.settings.base import AuxLosses, Lengths, Modes, Training
from posttrain.values import Settings, changing


class Pretrain(Settings, Training):
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
    """Give the tokenizer `<think>` and `</think>` and the template `enable_thinking`."""
    modes: Modes = ()
    aux: AuxLosses = Field(default_factory=dict)
    demo_noise: float = Field(0.0, ge=0, le=1)
    """Share of the demonstrations that are wrong, as a careless annotator writes them
    (`rewards/oracle.py`). Comes from the recipe's `noise`."""

    @model_validator(mode="after")
    def _modes_need_tokens(self) -> Self:
        if self.modes and not self.thinking:
            raise ValueError(
                f"modes = {list(self.modes)}: a model made without thinking has no modes; set "
                "thinking = true, or leave mode out of the demonstrations"
            )
        return self


class Sft(Lengths, Settings, Training):
    """Supervised fine-tuning on demonstrations: `r.sft(start=..., data=...)`."""

    batch_size: int = changing(64, gt=0)
    modes: Modes = ()
    aux: AuxLosses = Field(default_factory=dict)
    demo_noise: float = Field(0.0, ge=0, le=1)
    """Share of the demonstrations that are wrong, as a careless annotator writes them
    (`rewards/oracle.py`). Comes from the recipe's `noise`."""
    hint: str | None = None
    """Template of a second prompt for every demonstration, beside its own. Comes from the recipe's
    `hint`."""

    @field_validator("hint")
    @classmethod
    def _hint_is_a_template(cls, value: str | None) -> str | None:
        return None if value is None else check_hint(value)
