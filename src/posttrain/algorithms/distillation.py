"""Choices of on-policy distillation: what is lowered, and how domains are balanced."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain.values import ByKind, Settings, changing, tag


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
