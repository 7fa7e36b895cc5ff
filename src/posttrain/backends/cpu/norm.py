"""The norm of a Llama-like layer in bfloat16, in few passes over memory.

Its numbers are those of float32. Written with torch's operations it makes half a dozen copies of
that width, and autograd keeps most of them for the backward pass. Here blocks of tokens stay in the
processor's cache, and one number per token is kept beside what was given. The result is rounded
once, where the models' own modules round before the weight as well.

Legend: M tokens, R those of a block, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**17
"""Numbers of a block: 512 KiB of float32."""


def rms_norm(states_MD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """`states / sqrt(mean(states^2) + epsilon) * weight` along the last axis, differentiable."""
    normed_MD: Tensor = _RmsNorm.apply(states_MD, weight_D, epsilon)  # type: ignore[no-untyped-call]
    return normed_MD


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_MD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        dtype = torch.promote_types(states_MD.dtype, torch.float32)
        wide_D = weight_D.to(dtype)
        scale_M1 = torch.linalg.vector_norm(states_MD, dim=-1, keepdim=True, dtype=dtype)
        scale_M1.square_().mul_(1 / len(weight_D)).add_(epsilon).rsqrt_()
        normed_MD = torch.empty_like(states_MD)
        for rows in _blocks(states_MD):
            wide_RD = states_MD[rows].to(dtype, copy=True)
            normed_MD[rows] = wide_RD.mul_(scale_M1[rows]).mul_(wide_D)
        ctx.save_for_backward(states_MD, weight_D, scale_M1)
        return normed_MD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states_MD, weight_D, scale_M1 = ctx.saved_tensors
        wide_D = weight_D.to(scale_M1.dtype)
        grad_states_MD, grad_D = torch.empty_like(states_MD), torch.zeros_like(wide_D)
        for rows in _blocks(states_MD):
            unit_RD = states_MD[rows].to(wide_D.dtype, copy=True).mul_(scale_M1[rows])
            wide_RD = grads[0][rows].to(wide_D.dtype, copy=True)
            grad_D += (wide_RD * unit_RD).sum(0)
            wide_RD.mul_(wide_D)
            # What points along the states would change their size alone, which the norm undoes.
            along_R = torch.linalg.vecdot(wide_RD, unit_RD).mul_(-1 / len(wide_D))
            wide_RD.addcmul_(unit_RD, along_R[:, None]).mul_(scale_M1[rows])
            grad_states_MD[rows] = wide_RD
        return grad_states_MD, grad_D.to(weight_D.dtype), None


def _blocks(states_MD: Tensor) -> Iterator[slice]:
    """Slices of tokens."""
    step = max(1, BLOCK_ELEMENTS // states_MD.shape[-1])
    for begin in range(0, len(states_MD), step):
        yield slice(begin, begin + step)
