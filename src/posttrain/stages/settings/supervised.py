"""Settings of the stages that learn from given text: pretraining and supervised fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from posttrain.backends.prompting import check_hint
from posttrain.stages.settings.base import AuxLosses, Computing, Lengths, Modes, Training
from posttrain.values import Settings, changing


class Pretrain(Settings, Computing, Training):
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


class Sft(Lengths, Settings, Computing, Training):
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
