"""What every loss is made of: token log-probabilities, aggregation weights, KL estimators.

The log-probabilities are computed from hidden states and the output head in chunks of tokens, so
that no whole `[N, V]` matrix of logits exists once `N * V` exceeds `max_elements`.

Shape suffixes: N flat response tokens of all rows, D hidden size, V vocabulary, C tokens of one
chunk.
"""

from collections.abc import Iterator
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
"""Detached scalar sums over tokens; they add up when a batch is split."""

Aggregation = Literal["token", "sequence", "constant"]
Estimator = Literal["k1", "k2", "k3"]

MAX_ELEMENTS = 2**22
"""Default bound on tokens * vocabulary of one chunk: 16 MiB of float32."""

_CACHE_TOKENS = 1024
"""Above this a chunk gains no matrix-multiply speed and its elementwise passes leave the cache."""


def same_shape(**tensors: Tensor | None) -> None:
    """Raise ValueError naming the shapes unless all tensors have the same one (None is skipped)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these tensors must have the same shape: {listed}")


def known_choice(name: str, value: str, choices: Any) -> None:
    """Raise ValueError unless `value` is one of the strings of the Literal type `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(get_args(choices))}")


def active_sum(value_N: Tensor, weight_N: Tensor) -> Tensor:
    """Detached sum of `value_N` over the tokens whose weight is not zero (a 0-d tensor)."""
    return torch.where(weight_N != 0, value_N.detach(), 0).sum()


def weighted_sum(value_N: Tensor, weight_N: Tensor) -> Tensor:
    """Differentiable sum of `weight * value`; weight 0 adds nothing even to a value not finite."""
    return (weight_N * torch.where(weight_N != 0, value_N, 0)).sum()


def token_chunks(num_tokens: int, vocabulary: int, max_elements: int) -> Iterator[slice]:
    """Consecutive slices of at most `max(1, max_elements // vocabulary)` tokens, 1,024 at most."""
    if max_elements < 1:
        raise ValueError(f"max_elements: {max_elements} must be at least 1")
    step = min(max(1, max_elements // vocabulary), _CACHE_TOKENS)
    for begin in range(0, num_tokens, step):
        yield slice(begin, min(begin + step, num_tokens))


def chunk_buffer(like_ND: Tensor, vocabulary: int, max_elements: int) -> Tensor:
    """An uninitialised `[C, V]` buffer for the largest chunk, in the softmax type."""
    longest = next(token_chunks(like_ND.shape[0], vocabulary, max_elements), slice(0, 0))
    return like_ND.new_empty(longest.stop, vocabulary, dtype=softmax_dtype(like_ND))


def softmax_dtype(hidden_ND: Tensor) -> torch.dtype:
    """The type in which softmaxes and sums are computed: at least float32."""
    return torch.promote_types(hidden_ND.dtype, torch.float32)


def project(
    hidden_CD: Tensor, head_VD: Tensor, bias_V: Tensor | None, temperature: float, out_CV: Tensor
) -> Tensor:
    """Fill `out_CV` with the logits `(hidden @ head.T + bias) / temperature` and return it."""
    if hidden_CD.dtype == out_CV.dtype:
        torch.mm(hidden_CD, head_VD.T, out=out_CV)
    else:
        out_CV.copy_(hidden_CD @ head_VD.T)
    if bias_V is not None:
        out_CV.add_(bias_V)
    if temperature != 1.0:
        out_CV.div_(temperature)
    return out_CV


def check_projection(
    hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, temperature: float
) -> None:
    """Raise ValueError, naming the shapes, unless `hidden @ head.T + bias` is well formed."""
    if hidden_ND.dim() != 2 or head_VD.dim() != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)} must be [N, D] and head {tuple(head_VD.shape)} [V, D]"
        )
    if bias_V is not None and tuple(bias_V.shape) != (head_VD.shape[0],):
        raise ValueError(
            f"bias {tuple(bias_V.shape)} must have one entry per row of head {tuple(head_VD.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be above 0")


class HeadGradients:
    """Sums the gradients that flow from logits into hidden states, head and bias, chunk by chunk.

    Head and bias gradients are summed in the softmax type, so that many bfloat16 chunks lose
    nothing.
    """

    def __init__(
        self, hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, wanted: tuple[bool, ...]
    ) -> None:
        """`wanted` says for hidden, head and bias whether its gradient is needed."""
        dtype = softmax_dtype(hidden_ND)
        self._hidden_ND, self._head_VD, self._bias_V = hidden_ND, head_VD, bias_V
        self._grad_ND = torch.zeros_like(hidden_ND) if wanted[0] else None
        self._grad_VD = torch.zeros_like(head_VD, dtype=dtype) if wanted[1] else None
        self._grad_V = None
        if bias_V is not None and wanted[2]:
            self._grad_V = torch.zeros_like(bias_V, dtype=dtype)

    def add(self, chunk: slice, grad_CV: Tensor) -> None:
        """Add what the gradient `grad_CV` of these tokens' `hidden @ head.T + bias` contributes."""
        grad_like_hidden_CV = grad_CV.to(self._hidden_ND.dtype)
        if self._grad_ND is not None:
            torch.mm(grad_like_hidden_CV, self._head_VD, out=self._grad_ND[chunk])
        if self._grad_VD is not None:
            hidden_CD = self._hidden_ND[chunk]
            if self._grad_VD.dtype == hidden_CD.dtype:
                self._grad_VD.addmm_(grad_CV.T, hidden_CD)
            else:
                self._grad_VD.add_(grad_like_hidden_CV.T @ hidden_CD)
        if self._grad_V is not None:
            self._grad_V.add_(grad_CV.sum(0))

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, head and bias in the type of each, None where not wanted."""
        grad_VD = self._grad_VD
        if grad_VD is not None:
            grad_VD = grad_VD.to(self._head_VD.dtype)
        grad_V = self._grad_V
        if grad_V is not None and self._bias_V is not None:
            grad_V = grad_V.to(self._bias_V.dtype)
        return self._grad_ND, grad_VD, grad_V


class _TokenLogprobs(torch.autograd.Function):
    """Log-probability and entropy per token; keeps the softmax or computes it again by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        max_elements: int,
        keep_softmax: bool,
    ) -> tuple[Tensor, Tensor]:
        num_tokens, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
        dtype = softmax_dtype(hidden_ND)
        logp_N = hidden_ND.new_empty(num_tokens, dtype=dtype)
        entropy_N = torch.empty_like(logp_N)
        prob_NV = hidden_ND.new_empty(num_tokens, vocabulary, dtype=dtype) if keep_softmax else None
        logits_CV = chunk_buffer(hidden_ND, vocabulary, max_elements)
        logp_CV = torch.empty_like(logits_CV)
        for chunk in token_chunks(num_tokens, vocabulary, max_elements):
            size = chunk.stop - chunk.start
            z_CV, lp_CV = logits_CV[:size], logp_CV[:size]
            project(hidden_ND[chunk], head_VD, bias_V, temperature, z_CV)
            torch.log_softmax(z_CV, -1, out=lp_CV)
            logp_N[chunk] = lp_CV.gather(1, targets_N[chunk, None])[:, 0]
            p_CV = z_CV if prob_NV is None else prob_NV[chunk]
            torch.exp(lp_CV, out=p_CV)
            entropy_N[chunk] = lp_CV.mul_(p_CV).sum(-1).neg_()
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, targets_N, prob_NV)
        ctx.temperature, ctx.max_elements = temperature, max_elements
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, bias_V, targets_N, prob_NV = ctx.saved_tensors
        num_tokens, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
        scale_N = grads[0] / ctx.temperature
        sums = HeadGradients(hidden_ND, head_VD, bias_V, ctx.needs_input_grad[:3])
        buffer_CV = chunk_buffer(hidden_ND, vocabulary, ctx.max_elements)
        for chunk in token_chunks(num_tokens, vocabulary, ctx.max_elements):
            grad_CV = buffer_CV[: chunk.stop - chunk.start]
            if prob_NV is None:
                project(hidden_ND[chunk], head_VD, bias_V, ctx.temperature, grad_CV)
                p_CV = torch.softmax(grad_CV, -1)
            else:
                p_CV = prob_NV[chunk]
            # d logp[y] / d logits = onehot(y) - p
            scale_C1 = scale_N[chunk, None]
            torch.mul(p_CV, -scale_C1, out=grad_CV)
            grad_CV.scatter_add_(1, targets_N[chunk, None], scale_C1)
            sums.add(chunk, grad_CV)
        return (*sums.result(), None, None, None, None)


def token_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    max_elements: int = MAX_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Exact log-probability of each target and entropy (nats) of each softmax.

    `hidden_ND` are the states that predict `targets_N` (int64 in [0, V)); the logits are `(hidden @
    head.T + bias) / temperature`. The softmax is at least float32. A head of another type is cast
    to the hidden states' type. Up to `N * V <= max_elements` the softmax is kept for the backward
    pass; beyond that chunks of `max(1, max_elements // V)` tokens are computed again there, which
    bounds the memory at the price of one more projection. Raise `max_elements` for a large
    vocabulary: chunks below about 100 tokens multiply slowly.

    Returns `(logp_N, entropy_N)`: `logp_N` is differentiable with respect to hidden states, head
    and bias; `entropy_N` is detached. Raises ValueError if shapes do not fit or `temperature` is
    not positive.
    """
    check_projection(hidden_ND, head_VD, bias_V, temperature)
    same_shape(targets_N=targets_N, hidden_N=hidden_ND[:, 0])
    needs_grad = hidden_ND.requires_grad or head_VD.requires_grad
    needs_grad = needs_grad or (bias_V is not None and bias_V.requires_grad)
    fits = hidden_ND.shape[0] * head_VD.shape[0] <= max_elements
    keep_softmax = torch.is_grad_enabled() and needs_grad and fits
    logp_N, entropy_N = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND,
        head_VD.to(hidden_ND.dtype),
        bias_V,
        targets_N,
        temperature,
        max_elements,
        keep_softmax,
    )
    return cast(Tensor, logp_N), cast(Tensor, entropy_N)


def aggregation_weights(
    row_N: Tensor, num_rows: int, *, aggregation: Aggregation, constant: int | None = None
) -> tuple[Tensor, float]:
    """How much each token counts, and what the summed loss is to be divided by.

    `row_N` is the row (int64 in [0, num_rows)) of each token.

    - `token`: weight 1, count N. Every token of the batch counts the same (DAPO, arXiv 2503.14476).
    - `sequence`: weight 1 / tokens of the row, count = rows with at least one token. Mean over rows
      of the mean over tokens (GRPO, arXiv 2402.03300).
    - `constant`: weight 1 / `constant`, count = `num_rows`. Length does not rescale the gradient
      (Dr.GRPO, arXiv 2503.20783, with `constant` = the response limit). Only here is `constant`
      read.

    For a batch in parts sum the counts of the parts. Returns `(weight_N float32, count)`. Raises
    ValueError for another `aggregation`, or where `constant` is needed and not a positive number.
    """
    known_choice("aggregation", aggregation, Aggregation)
    if aggregation == "token":
        return torch.ones_like(row_N, dtype=torch.float32), float(row_N.numel())
    if aggregation == "constant":
        if constant is None or constant < 1:
            raise ValueError(
                f"constant: {constant} must be at least 1 token with aggregation 'constant'; "
                "Dr.GRPO uses the limit on response tokens"
            )
        weight_N = torch.full_like(row_N, 1.0 / constant, dtype=torch.float32)
        return weight_N, float(num_rows)
    length_B = torch.bincount(row_N, minlength=num_rows)
    weight_N = length_B.to(torch.float32).reciprocal()[row_N]
    return weight_N, float(torch.count_nonzero(length_B))


def kl_estimate(logp_N: Tensor, ref_logp_N: Tensor, *, estimator: Estimator) -> Tensor:
    """KL(student || reference) per sampled token, from the log-probabilities of that token alone.

    With `d = logp - ref_logp`: k1 = d, k2 = d**2 / 2, k3 = exp(-d) - 1 + d (Schulman,
    "Approximating KL divergence", 2020). k1 and k3 are unbiased VALUES. Gradients are another
    matter: see `posttrain.losses.policy.kl_penalty`. Differentiable in both arguments.
    """
    known_choice("estimator", estimator, Estimator)
    same_shape(logp_N=logp_N, ref_logp_N=ref_logp_N)
    difference_N = logp_N - ref_logp_N
    if estimator == "k1":
        return difference_N
    if estimator == "k2":
        return 0.5 * difference_N.square()
    return torch.expm1(-difference_N) + difference_N
