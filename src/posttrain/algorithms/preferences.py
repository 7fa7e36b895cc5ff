"""Losses on preference pairs, of policies and of reward models."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.values import ByKind, Settings, changing, tag


class Dpo(Settings):
    """Direct preference optimisation (arXiv 2305.18290)."""

    MEAN: ClassVar[bool] = False
    kind: Literal["dpo"] = tag("dpo")
    beta: float = changing(0.1, gt=0)
    """Reward per nat of the score."""
    label_smoothing: float = changing(0.0, ge=0, lt=0.5)
    """Share of pairs thought to be labelled the wrong way round."""
    nll_weight: float = changing(0.0, ge=0)
    """Weight of the cross-entropy of the chosen response. Llama 3: 0.2."""


class DpoNorm(Settings):
    """DPO on mean log-ratios per token (Tülu 3, arXiv 2411.15124)."""

    MEAN: ClassVar[bool] = True
    kind: Literal["dpo_norm"] = tag("dpo_norm")
    beta: float = changing(0.1, gt=0)
    """Reward per nat of the score. Tülu 3: 5."""
    label_smoothing: float = changing(0.0, ge=0, lt=0.5)
    nll_weight: float = changing(0.0, ge=0)


class SimPO(Settings):
    """Mean log-probabilities and a margin, without a reference (arXiv 2405.14734)."""

    MEAN: ClassVar[bool] = True
    kind: Literal["simpo"] = tag("simpo")
    beta: float = changing(0.1, gt=0)
    """Reward per nat of the score. SimPO: 2 to 2.5."""
    gamma: float = changing(0.5, ge=0)
    """Margin that is asked for between the rewards."""
    label_smoothing: float = changing(0.0, ge=0, lt=0.5)
    nll_weight: float = changing(0.0, ge=0)


class Ipo(Settings):
    """A squared loss onto a fixed margin (arXiv 2310.12036)."""

    MEAN: ClassVar[bool] = True
    kind: Literal["ipo"] = tag("ipo")
    beta: float = changing(0.1, gt=0)
    nll_weight: float = changing(0.0, ge=0)


class Kto(Settings):
    """Learns from each response by itself, as desirable or not (arXiv 2402.01306)."""

    MEAN: ClassVar[bool] = False
    kind: Literal["kto"] = tag("kto")
    beta: float = changing(0.1, gt=0)
    desirable_weight: float = changing(1.0, gt=0)
    undesirable_weight: float = changing(1.0, gt=0)
    """Weights of chosen and rejected responses."""


Preference = Annotated[Dpo | DpoNorm | SimPO | Ipo | Kto, Field(discriminator="kind"), ByKind]


class BradleyTerry(Settings):
    """By the difference of the two rewards of a pair."""

    kind: Literal["bradley_terry"] = tag("bradley_terry")
    margins: Literal["none", "strength", "margin"] = "none"
    """`strength` asks for a larger difference of clearer preferences (Llama 2), `margin` for as
    much as each pair says."""
    centring: float = changing(0.0, ge=0)
    """Weight of the squared sum of a pair's rewards, which pulls their mean to 0. 0.01 is usual."""


class Pointwise(Settings):
    """By each response as good or bad."""

    kind: Literal["pointwise"] = tag("pointwise")


RewardLoss = Annotated[BradleyTerry | Pointwise, Field(discriminator="kind"), ByKind]
