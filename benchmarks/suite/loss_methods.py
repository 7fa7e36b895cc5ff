"""The reverse KL between two output layers, forward and backward, in five ways.

Every method takes student hidden states and head (both with gradients) and a teacher's, and returns
the mean over tokens of KL(student || teacher).

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LIGER = ("Liger, chunks of 1024 tokens", "Liger, chunks of 256 tokens")
TRL, NAIVE, OURS = "TRL chunked divergence", "naive", "ours"
METHODS = (OURS, TRL, *LIGER, NAIVE)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Hidden states and heads of both models."""

    hidden_ND: Tensor
    head_VD: Tensor
    teacher_ND: Tensor
    teacher_head_VD: Tensor

    def gradients(self, loss: Loss) -> float:
        """One forward and backward pass from no gradients; returns the loss."""
        self.hidden_ND.grad = self.head_VD.grad = None
        value = loss(self.hidden_ND, self.head_VD, self.teacher_ND, self.teacher_head_VD)
        value.backward()
        return value.item()

    def part(self, vocabulary: int, tokens: int) -> Problem:
        """The first words and tokens of it, as tensors of their own."""
        return Problem(
            hidden_ND=self.hidden_ND[:tokens].detach().clone().requires_grad_(),
            head_VD=self.head_VD[:vocabulary].detach().clone().requires_grad_(),
            teacher_ND=self.teacher_ND[:tokens].clone(),
            teacher_head_VD=self.teacher_head_VD[:vocabulary].clone(),
        )

    @property
    def gradient_bytes(self) -> int:
        """What the gradients of hidden states and head take."""
        return 4 * (self.hidden_ND.numel() + self.head_VD.numel())


def problem(vocabulary: int, hidden: int, tokens: int) -> Problem:
    """Random hidden states, and logits with a standard deviation of 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        return torch.randn(rows, hidden, generator=generator).mul_(scale)

    scale = 2 / hidden**0.5
    return Problem(
        hidden_ND=normal(tokens, 1.0).requires_grad_(),
        head_VD=normal(vocabulary, scale).requires_grad_(),
        teacher_ND=normal(tokens, 1.0),
        teacher_head_VD=normal(vocabulary, scale),
    )


def method(name: str) -> Loss:
    """The loss of that name; imports what it needs."""
    if name == OURS:
        from suite.ours import distillation_loss

        return distillation_loss
    if name == TRL:
        return _trl()
    if name in LIGER:
        return _liger(int(name.split()[-2]))
    return naive


def naive(
    hidden_ND: Tensor, head_VD: Tensor, teacher_ND: Tensor, teacher_head_VD: Tensor
) -> Tensor:
    """All logits at once, as one writes it down."""
    logp_NV = torch.log_softmax(hidden_ND @ head_VD.T, -1)
    with torch.no_grad():
        teacher_NV = torch.log_softmax(teacher_ND @ teacher_head_VD.T, -1)
    divergence = torch.nn.functional.kl_div(teacher_NV, logp_NV, reduction="sum", log_target=True)
    return divergence / len(hidden_ND)


def _trl() -> Loss:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(
        hidden_ND: Tensor, head_VD: Tensor, teacher_ND: Tensor, teacher_head_VD: Tensor
    ) -> Tensor:
        mask = torch.ones(1, len(hidden_ND), dtype=torch.int64)
        value, _, _ = _chunked_divergence_loss(
            hidden_ND[None], teacher_ND[None], head_VD, teacher_head_VD, mask, beta=1.0
        )
        return value

    return loss


def _liger(chunk: int) -> Loss:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    # Not compiled: on a CPU that gains nothing and asks for a compiler.
    fused = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False, chunk_size=chunk
    )

    def loss(
        hidden_ND: Tensor, head_VD: Tensor, teacher_ND: Tensor, teacher_head_VD: Tensor
    ) -> Tensor:
        labels_N = torch.zeros(len(hidden_ND), dtype=torch.int64)
        return fused(hidden_ND, head_VD, teacher_ND, teacher_head_VD, labels_N)

    return loss
