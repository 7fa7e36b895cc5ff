"""Settings of a policy that stays a judge while it learns; `Rl` has them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field


class Critiquing(BaseModel):
    """Learning to judge, beside the rewards, from what the policy has just sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset({"critique_weight", "critique_pairs"})

    critique_weight: float = Field(0.0, ge=0)
    """Weight of the mean cross-entropy of verdicts on pairs of the step's own responses, of which
    the verifier says which is better (the closed loop of Kimi K2's critic)."""
    critique_pairs: int = Field(32, gt=0)
    """Most pairs per optimiser step."""
    critique_domains: tuple[str, ...] = ()
    """Domains whose responses are compared; all of the stage's if none are given."""
