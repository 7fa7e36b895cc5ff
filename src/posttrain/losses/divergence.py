"""Divergences from a student to its teachers, from hidden states and heads.

Both models' logits exist only for one chunk of tokens at a time. As the loss is a weighted sum,
its gradient is known as soon as a chunk's value is, so it is computed in the forward pass and each
chunk is projected once: 8 NVD floating point operations instead of the 10 to 12 of checkpointed
chunks. The price is that hidden and head gradients are held between forward and backward.

Shape suffixes: N flat response tokens of all rows, C tokens of one chunk, R tokens of one block of
it, V vocabulary, D student's and E teacher's hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from posttrain.losses.projection import (
    HeadGradients,
    block_buffer,
    chunk_buffer,
    finish,
    narrow_into,
    project,
    row_blocks,
    softmax_dtype,
    token_chunks,
    wide_buffer,
)

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Wanted = tuple[bool, ...]
"""Whether the gradients of hidden states, head and bias are needed."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Compute = Callable[[Tensor, Tensor, Tensor | None, Wanted], tuple[tuple[Tensor, ...], Gradients]]
"""`(hidden, head, bias, wanted) -> ((loss, values per token ...), gradients of the loss)`."""

_LARGEST_RATIO = 80.0
"""Bound on |log p - log t| in the JSD: exp(80) is finite in float32, and beyond it the smaller of
the two probabilities is below 2e-35 and adds nothing."""


class GradientsInForward(torch.autograd.Function):
    """The outputs of a `Compute`, of which the first is differentiable, its gradients stored.

    The backward pass hands the stored gradients over instead of copying them, so that autograd can
    make them a parameter's `.grad` as they are. A second pass over a retained graph computes them
    again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        compute: Compute,
        track: bool,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # `needs_input_grad` does not depend on grad mode, which is off in here: hence `track`.
        wanted = tuple(track and needed for needed in ctx.needs_input_grad[2:])
        outputs, ctx.gradients = compute(hidden_ND, head_VD, bias_V, wanted)
        ctx.compute, ctx.wanted = compute, wanted
        ctx.save_for_backward(hidden_ND, head_VD, bias_V)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = ctx.compute(*ctx.saved_tensors, ctx.wanted)
        if grads[0] != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grads[0])
        return None, None, *gradients


def with_gradients(
    compute: Compute, hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, ...]:
    """The outputs of `compute`; the first carries its gradient to hidden states, head and bias.

    The head is cast to the type of the hidden states. Without grad mode no gradient is computed.
    """
    outputs: tuple[Tensor, ...] = GradientsInForward.apply(  # type: ignore[no-untyped-call]
        compute, torch.is_grad_enabled(), hidden_ND, head_VD.to(hidden_ND.dtype), bias_V
    )
    return outputs


class OutputLayer(Protocol):
    """The tensors of a teacher's output head."""

    @property
    def weight_VD(self) -> Tensor: ...

    @property
    def bias_V(self) -> Tensor | None: ...


class ClosedHead(Protocol):
    """A teacher's output head that is read from where it lies when its tokens are reached."""

    @property
    def shape(self) -> tuple[int, int]:
        """Vocabulary and hidden size."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights."""
        ...

    @property
    def has_bias(self) -> bool:
        """Whether it brings a bias."""
        ...

    def open(self) -> OutputLayer:
        """The tensors. They are given up after the last of the teacher's tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class TeacherStates:
    """A teacher's last hidden states at consecutive tokens, and its output head. Constants.

    Logits are computed in the wider of the two types, so that states may be kept in bfloat16
    beside a float32 head; they are widened one chunk at a time.
    """

    hidden_NE: Tensor
    head_VE: Tensor | ClosedHead
    bias_V: Tensor | None = None
    """Of an open head; a closed one brings its own."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the product of states and head."""
        return torch.promote_types(self.hidden_NE.dtype, self.head_VE.dtype)

    @property
    def has_bias(self) -> bool:
        """Whether something is added to the product."""
        head = self.head_VE
        return self.bias_V is not None if isinstance(head, Tensor) else head.has_bias

    def opened(self) -> OpenTeacher:
        """With the tensors of the head."""
        if isinstance(self.head_VE, Tensor):
            return OpenTeacher(self.hidden_NE, self.head_VE, self.bias_V)
        head = self.head_VE.open()
        device = self.hidden_NE.device
        bias_V = None if head.bias_V is None else head.bias_V.to(device)
        return OpenTeacher(self.hidden_NE, head.weight_VD.to(device), bias_V)


@dataclass(frozen=True)
class OpenTeacher:
    """A teacher whose output head is in memory."""

    hidden_NE: Tensor
    head_VE: Tensor
    bias_V: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the product of states and head."""
        return torch.promote_types(self.hidden_NE.dtype, self.head_VE.dtype)

    def fill(self, first: int, chunk: slice, out_CV: Tensor) -> None:
        """Write the logits of those tokens of `chunk` that are this teacher's into `out_CV`, at
        temperature 1; `first` is where the teacher's tokens begin among all tokens."""
        begin, end = max(chunk.start, first), min(chunk.stop, first + len(self.hidden_NE))
        hidden_CE = self.hidden_NE[begin - first : end - first].to(self.dtype)
        # Other rows of this chunk are those of other teachers.
        rows_CV = out_CV[begin - chunk.start : end - chunk.start]
        project(hidden_CE, self.head_VE.to(self.dtype), rows_CV)
        if self.bias_V is not None:
            rows_CV.add_(self.bias_V)


class TeachersInTurn:
    """The teachers of all tokens, of which one at a time has its output head in memory."""

    def __init__(self, teachers: Sequence[TeacherStates]) -> None:
        self._teachers = teachers
        self._number = -1
        self._open: OpenTeacher | None = None

    def fill(self, chunk: slice, out_CV: Tensor) -> None:
        """Write the teachers' logits of the tokens of `chunk` into `out_CV`, at temperature 1.
        Chunks come in their order, so that each head is opened once."""
        first = 0
        for number, teacher in enumerate(self._teachers):
            end = first + len(teacher.hidden_NE)
            if first < chunk.stop and chunk.start < end:
                if number != self._number:
                    # The one before goes first.
                    self._open = None
                    self._number, self._open = number, teacher.opened()
                assert self._open is not None
                self._open.fill(first, chunk, out_CV)
            first = end


@torch.no_grad()
def full_vocabulary_sum(
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    wanted: Wanted,
    *,
    teachers: Sequence[TeacherStates],
    weight_N: Tensor,
    divergence: Divergence,
    beta: float,
    temperature: float,
    max_elements: int,
) -> tuple[tuple[Tensor, ...], Gradients]:
    """Sum over tokens of `weight * divergence` over the whole vocabulary, with its gradients.

    The first tokens are those of the first teacher, and so on. The outputs after the sum are per
    token: reverse KL and student entropy.
    """
    num_tokens, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
    sums = HeadGradients(hidden_ND, head_VD, bias_V, wanted)
    kl_N = hidden_ND.new_empty(num_tokens, dtype=softmax_dtype(hidden_ND))
    loss_N, entropy_N = torch.empty_like(kl_N), torch.empty_like(kl_N)
    student_CV = chunk_buffer(hidden_ND, vocabulary, max_elements)
    teacher_CV = torch.empty_like(student_CV, dtype=_logits_dtype(hidden_ND, teachers))
    blocks = block_buffer(student_CV), block_buffer(student_CV)
    student_wide, teacher_wide = wide_buffer(student_CV), wide_buffer(teacher_CV)
    in_turn = TeachersInTurn(teachers)
    # The logits are products over `temperature`; `_jsd` leaves its factor 1 - beta out.
    scale_N = weight_N * ((1 - beta if divergence == "jsd" else 1.0) / temperature)
    for chunk in token_chunks(num_tokens, vocabulary, max_elements, hidden_ND.dtype):
        grad_CV = student_CV[: chunk.stop - chunk.start]
        project(hidden_ND[chunk], head_VD, grad_CV)
        in_turn.fill(chunk, teacher_CV)
        for rows in row_blocks(grad_CV):
            at = slice(chunk.start + rows.start, chunk.start + rows.stop)
            z_RV = finish(grad_CV[rows], bias_V, temperature, student_wide)
            u_RV = finish(teacher_CV[rows], None, temperature, teacher_wide)
            logp_RV, ratio_RV = (block[: rows.stop - rows.start] for block in blocks)
            # What the buffers hold, in turn. z: student logits, t (not for reverse KL), gradient.
            # u: teacher logits, p. ratio: log t, log(p / t). logp: log p.
            torch.log_softmax(z_RV, -1, out=logp_RV)
            torch.log_softmax(u_RV, -1, out=ratio_RV)
            if divergence != "reverse_kl":
                torch.exp(ratio_RV, out=z_RV)
            torch.sub(logp_RV, ratio_RV, out=ratio_RV)
            p_RV = torch.exp(logp_RV, out=u_RV)
            entropy_N[at] = torch.linalg.vecdot(p_RV, logp_RV).neg_()
            kl_N[at] = torch.linalg.vecdot(p_RV, ratio_RV)
            if divergence == "reverse_kl":
                # d KL(p || t) / d logit_v = p_v (log(p_v / t_v) - KL)
                loss_N[at] = kl_N[at]
                torch.mul(ratio_RV.sub_(kl_N[at, None]), p_RV, out=z_RV)
            elif divergence == "forward_kl":
                # d KL(t || p) / d logit_v = p_v - t_v
                loss_N[at] = torch.linalg.vecdot(z_RV, ratio_RV).neg_()
                torch.sub(p_RV, z_RV, out=z_RV)
            else:
                # log p has been used: its block serves as work space.
                loss_N[at] = _jsd(z_RV, p_RV, ratio_RV, logp_RV, beta)
            narrow_into(grad_CV[rows], z_RV)
        if any(wanted):
            sums.add(chunk, grad_CV, scale_N[chunk])
    loss = (loss_N * weight_N).sum()
    return (loss, kl_N, entropy_N), sums.result()


def _logits_dtype(hidden_ND: Tensor, teachers: Sequence[TeacherStates]) -> torch.dtype:
    """The type that holds the logits of all teachers with no more rounding than their products, or
    that of the softmax where this is narrower."""
    dtype = hidden_ND.dtype
    for teacher in teachers:
        dtype = torch.promote_types(dtype, teacher.dtype)
        if teacher.has_bias:
            dtype = torch.promote_types(dtype, torch.float32)
    widest = softmax_dtype(hidden_ND)
    return dtype if torch.promote_types(dtype, widest) == widest else widest


def _jsd(t_RV: Tensor, p_RV: Tensor, ratio_RV: Tensor, work_RV: Tensor, beta: float) -> Tensor:
    """The generalised JSD per token; `t_RV` becomes its gradient over 1 - beta.

    With m = (1 - beta) p + beta t, log(p / m) = -log(1 + beta (t / p - 1)), which is exactly 0
    where p = t. d JSD / d logit_v = (1 - beta) p_v (log(p_v / m_v) - KL(p || m)): the derivatives
    of m cancel.
    """
    ratio_RV.clamp_(-_LARGEST_RATIO, _LARGEST_RATIO)
    over_m_RV = torch.neg(ratio_RV, out=work_RV).expm1_().mul_(beta).log1p_().neg_()
    kl_student_R: Tensor = torch.linalg.vecdot(p_RV, over_m_RV)
    # log(t / m) = log(p / m) - log(p / t)
    kl_teacher_R: Tensor = torch.linalg.vecdot(t_RV, ratio_RV.sub_(over_m_RV)).neg_()
    torch.mul(over_m_RV.sub_(kl_student_R[:, None]), p_RV, out=t_RV)
    return beta * kl_teacher_R + (1 - beta) * kl_student_R


@torch.no_grad()
def top_k_sum(
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    wanted: Wanted,
    *,
    top_ids_NK: Tensor,
    top_logp_NK: Tensor,
    weight_N: Tensor,
    temperature: float,
    max_elements: int,
) -> tuple[tuple[Tensor, ...], Gradients]:
    """Sum over tokens of `weight * sum over the teacher's top k of p log(p / t) - p + t`.

    The outputs after the sum are per token: that divergence, student entropy, student mass on the
    set.
    """
    num_tokens, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
    sums = HeadGradients(hidden_ND, head_VD, bias_V, wanted)
    kl_N = hidden_ND.new_empty(num_tokens, dtype=softmax_dtype(hidden_ND))
    entropy_N, mass_N = torch.empty_like(kl_N), torch.empty_like(kl_N)
    student_CV = chunk_buffer(hidden_ND, vocabulary, max_elements)
    block_RV, wide = block_buffer(student_CV), wide_buffer(student_CV)
    for chunk in token_chunks(num_tokens, vocabulary, max_elements, hidden_ND.dtype):
        grad_CV = student_CV[: chunk.stop - chunk.start]
        project(hidden_ND[chunk], head_VD, grad_CV)
        for rows in row_blocks(grad_CV):
            at = slice(chunk.start + rows.start, chunk.start + rows.stop)
            z_RV = finish(grad_CV[rows], bias_V, temperature, wide)
            logp_RV = block_RV[: rows.stop - rows.start]
            ids_RK, teacher_logp_RK = top_ids_NK[at], top_logp_NK[at].to(kl_N.dtype)
            torch.log_softmax(z_RV, -1, out=logp_RV)
            # [R, V] -> [R, K]: the student on the set of the teacher.
            logp_RK = logp_RV.gather(1, ids_RK)
            p_RK = logp_RK.exp()
            weighted_RK = p_RK * (logp_RK - teacher_logp_RK)
            kl_N[at] = (weighted_RK + (teacher_logp_RK.exp() - p_RK)).sum(-1)
            mass_N[at] = p_RK.sum(-1)
            # Over the logits: `grad_CV` turns from logits into probabilities into the gradient.
            p_RV = torch.exp(logp_RV, out=z_RV)
            entropy_N[at] = torch.linalg.vecdot(p_RV, logp_RV).neg_()
            # The mass correction cancels the + 1 of d (p log p) / dp. With a = log(p / t) on
            # the set and 0 outside: d loss / d logit_v = p_v (a_v - sum_u p_u a_u).
            p_RV.mul_(-weighted_RK.sum(-1, keepdim=True)).scatter_add_(1, ids_RK, weighted_RK)
            narrow_into(grad_CV[rows], p_RV)
        if any(wanted):
            sums.add(chunk, grad_CV, weight_N[chunk] / temperature)
    loss = (kl_N * weight_N).sum()
    return (loss, kl_N, entropy_N, mass_N), sums.result()
