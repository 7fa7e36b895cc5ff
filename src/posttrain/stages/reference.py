"""The frozen model that a policy is held to; it may be set to the policy from time to time.

Legend: N flat response tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from posttrain.backends.checkpoint import load
from posttrain.backends.local import LocalLearner, LocalScorer, response_logprobs
from posttrain.rl.types import Rollouts


class Reference:
    """A reference policy: the checkpoint of `directory` until the first reset."""

    def __init__(
        self, directory: Path, *, every: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`every` is the number of steps between resets, None for never."""
        self.every = every
        self.scorer = LocalScorer(load(directory, dtype=dtype, device=device))

    def logprobs(self, rollouts: Rollouts, *, temperature: float) -> Tensor:
        """`logp_N` of the response tokens, on the CPU. No gradient."""
        hidden_ND = self.scorer.hidden(rollouts)
        return response_logprobs(hidden_ND, self.scorer.head, rollouts, temperature)

    @torch.no_grad()
    def reset(self, step: int, learner: LocalLearner) -> None:
        """Before 0-based `step`: take over the learner's weights where it is time to."""
        if self.every is None or step == 0 or step % self.every:
            return
        for mine, policy in zip(
            self.scorer.model.parameters(), learner.model.parameters(), strict=True
        ):
            mine.copy_(policy)

    def state(self) -> dict[str, Tensor]:
        """The weights where they change; the start's are read from the start."""
        if self.every is None:
            return {}
        return {name: value.detach() for name, value in self.scorer.model.named_parameters()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, parameter in self.scorer.model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
