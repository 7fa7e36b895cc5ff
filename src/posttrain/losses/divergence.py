"""Reverse KL to a teacher from hidden states and heads, gradients computed in the forward pass.

Both models' logits exist only for one chunk of tokens at a time. As the divergence is a weighted
sum, its gradient is known as soon as a chunk's value is, so each chunk is projected once: 8 NVD
floating point operations instead of the 10 to 12 of checkpointed chunks. The price is that hidden
and head gradients are held between forward and backward.

Shape suffixes: N flat response tokens of all rows, C tokens of one chunk, V vocabulary, D student's
and E teacher's hidden size, K top-k.
"""

from typing import Any

import torch
from torch import Tensor

from posttrain.losses.ops import (
    HeadGradients,
    chunk_buffer,
    project,
    softmax_dtype,
    token_chunks,
)


def _saved_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients stored in the forward pass, times the gradient that arrives at the loss."""
    return tuple(
        None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors
    )


class FullVocabularyKL(torch.autograd.Function):
    """Sum over tokens of `weight * KL(student || teacher)` over the whole vocabulary.

    Returns the sum and, per token and detached: KL, student entropy, student and teacher
    log-probability of the target (empty without targets).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        teacher_hidden_NE: Tensor,
        teacher_head_VE: Tensor,
        teacher_bias_V: Tensor | None,
        weight_N: Tensor,
        targets_N: Tensor | None,
        temperature: float,
        max_elements: int,
        track: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        num_tokens, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
        wanted = tuple(track and needed for needed in ctx.needs_input_grad[:3])
        sums = HeadGradients(hidden_ND, head_VD, bias_V, wanted)
        dtype = softmax_dtype(hidden_ND)
        kl_N = hidden_ND.new_empty(num_tokens, dtype=dtype)
        entropy_N = torch.empty_like(kl_N)
        logp_N = kl_N.new_empty(0 if targets_N is None else num_tokens)
        teacher_logp_N = torch.empty_like(logp_N)
        first_CV = chunk_buffer(hidden_ND, vocabulary, max_elements)
        second_CV, third_CV = torch.empty_like(first_CV), torch.empty_like(first_CV)
        for chunk in token_chunks(num_tokens, vocabulary, max_elements):
            size = chunk.stop - chunk.start
            a_CV, b_CV, logp_CV = first_CV[:size], second_CV[:size], third_CV[:size]
            project(hidden_ND[chunk], head_VD, bias_V, temperature, a_CV)
            torch.log_softmax(a_CV, -1, out=logp_CV)
            project(teacher_hidden_NE[chunk], teacher_head_VE, teacher_bias_V, temperature, b_CV)
            torch.log_softmax(b_CV, -1, out=a_CV)
            if targets_N is not None:
                targets_C1 = targets_N[chunk, None]
                logp_N[chunk] = logp_CV.gather(1, targets_C1)[:, 0]
                teacher_logp_N[chunk] = a_CV.gather(1, targets_C1)[:, 0]
            weighted_CV = torch.sub(logp_CV, a_CV, out=b_CV)
            p_CV = torch.exp(logp_CV, out=a_CV)
            entropy_N[chunk] = logp_CV.mul_(p_CV).sum(-1).neg_()
            weighted_CV.mul_(p_CV)
            kl_C1 = weighted_CV.sum(-1, keepdim=True)
            kl_N[chunk] = kl_C1[:, 0]
            if any(wanted):
                # d KL / d logit_v = p_v (log(p_v / t_v) - KL)
                grad_CV = weighted_CV.addcmul_(p_CV, kl_C1, value=-1)
                sums.add(chunk, grad_CV.mul_(weight_N[chunk, None] / temperature))
        ctx.save_for_backward(*sums.result())
        ctx.mark_non_differentiable(kl_N, entropy_N, logp_N, teacher_logp_N)
        return _weighted(kl_N, weight_N), kl_N, entropy_N, logp_N, teacher_logp_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_saved_gradients(ctx, grads[0]), *(None,) * 8)


class TopKKL(torch.autograd.Function):
    """Sum over tokens of `weight * sum over the teacher's top k of p log(p / t) - p + t`.

    Returns the sum and, per token and detached: that divergence, student entropy, student
    log-probability of the target (empty without targets), student mass on the set.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        top_ids_NK: Tensor,
        top_logp_NK: Tensor,
        weight_N: Tensor,
        targets_N: Tensor | None,
        temperature: float,
        max_elements: int,
        track: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        num_tokens, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
        wanted = tuple(track and needed for needed in ctx.needs_input_grad[:3])
        sums = HeadGradients(hidden_ND, head_VD, bias_V, wanted)
        dtype = softmax_dtype(hidden_ND)
        kl_N = hidden_ND.new_empty(num_tokens, dtype=dtype)
        entropy_N, mass_N = torch.empty_like(kl_N), torch.empty_like(kl_N)
        logp_N = kl_N.new_empty(0 if targets_N is None else num_tokens)
        first_CV = chunk_buffer(hidden_ND, vocabulary, max_elements)
        second_CV = torch.empty_like(first_CV)
        for chunk in token_chunks(num_tokens, vocabulary, max_elements):
            size = chunk.stop - chunk.start
            a_CV, logp_CV = first_CV[:size], second_CV[:size]
            ids_CK, teacher_logp_CK = top_ids_NK[chunk], top_logp_NK[chunk].to(dtype)
            project(hidden_ND[chunk], head_VD, bias_V, temperature, a_CV)
            torch.log_softmax(a_CV, -1, out=logp_CV)
            if targets_N is not None:
                logp_N[chunk] = logp_CV.gather(1, targets_N[chunk, None])[:, 0]
            logp_CK = logp_CV.gather(1, ids_CK)
            p_CK = logp_CK.exp()
            weighted_CK = p_CK * (logp_CK - teacher_logp_CK)
            kl_N[chunk] = (weighted_CK + (teacher_logp_CK.exp() - p_CK)).sum(-1)
            mass_N[chunk] = p_CK.sum(-1)
            p_CV = torch.exp(logp_CV, out=a_CV)
            entropy_N[chunk] = logp_CV.mul_(p_CV).sum(-1).neg_()
            if any(wanted):
                # The mass correction cancels the + 1 of d (p log p) / dp. With a = log(p / t) on
                # the set and 0 outside: d loss / d logit_v = p_v (a_v - sum_u p_u a_u).
                grad_CV = p_CV.mul_(-weighted_CK.sum(-1, keepdim=True))
                grad_CV.scatter_add_(1, ids_CK, weighted_CK)
                sums.add(chunk, grad_CV.mul_(weight_N[chunk, None] / temperature))
        ctx.save_for_backward(*sums.result())
        ctx.mark_non_differentiable(kl_N, entropy_N, logp_N, mass_N)
        return _weighted(kl_N, weight_N), kl_N, entropy_N, logp_N, mass_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_saved_gradients(ctx, grads[0]), *(None,) * 7)


def _weighted(value_N: Tensor, weight_N: Tensor) -> Tensor:
    """The sum of `weight * value` over tokens."""
    return (value_N * weight_N).sum()
