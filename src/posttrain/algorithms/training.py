"""What all stages that learn choose: optimiser, learning-rate decay, auxiliary losses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from posttrain.values import ByKind, Settings, changing, tag


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
    states: Literal["float32", "int8"] = "float32"
    """Type of the moments. In 8 bits they take a fourth of the memory; needs bitsandbytes."""
    master: Literal["float32", "stochastic"] = "float32"
    """The weights that a step changes: float32 ones, of which bfloat16 ones are copies where these
    compute; or the bfloat16 ones themselves, rounded up or down at random."""


class LoRA(Settings):
    """Learn low-rank matrices beside the weights, which stay as they are (Hu et al., arXiv
    2106.09685), with peft: a layer computes `W x + alpha / rank * B (A x)`, and A and B learn.

    A begins with random numbers of the stage's seed and B with 0. There is no dropout: models learn
    in evaluation mode, so that the policy that learns is the one that sampled.
    """

    rank: int = Field(16, gt=0)
    """Of the matrices: A has so many rows, B so many columns."""
    alpha: float = Field(32.0, gt=0)
    """Factor on what they add, over the rank: then the best learning rate hardly depends on the
    rank."""
    targets: list[str] | Literal["all-linear"] = Field("all-linear", min_length=1)
    """Names of the linear layers that get them, such as q_proj; "all-linear": all but the output
    layer."""
    dora: bool = False
    """Learn the length of each column of the weights by itself (DoRA, arXiv 2402.09353)."""
    rslora: bool = False
    """Divide alpha by the root of the rank instead of the rank (rsLoRA, arXiv 2312.03732)."""

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            raise ValueError(
                f'{value!r} is no list of layers; write ["{value}"], or "all-linear" for all'
            )
        return value


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
