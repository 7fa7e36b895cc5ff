"""What every loss is made of: token log-probabilities, cross-entropy, aggregation weights, KL.

The log-probabilities are computed from hidden states and the output head in chunks of tokens, so
that no whole `[N, V]` matrix of logits exists once `N * V` exceeds `max_elements`.

Shape suffixes: N flat response tokens of all rows, D hidden size, V vocabulary, C tokens of one
chunk.
"""

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from posttrain.losses.projection import (
    MAX_ELEMENTS,
    HeadGradients,
    block_buffer,
    check_projection,
    chunk_buffer,
    finish,
    narrow_into,
    per_four_bytes,
    project,
    row_blocks,
    softmax_dtype,
    token_chunks,
    wide_buffer,
)

Metrics = dict[str, Tensor]
"""Detached scalar sums over tokens; they add up when a batch is split."""

Aggregation = Literal["token", "sequence", "constant"]
Estimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Bound on the log of a ratio of probabilities where it is exponentiated, in nats: verl's
(`core_algos.compute_policy_loss`). exp overflows float32 at 88.7, and inf times 0 is NaN."""
MAX_KL_GAP = 10.0
"""The same within k3, whose value is exp of the gap: exp(10) is 2.2e4. verl bounds k3, too."""
_KEEP_ELEMENTS = 2**25
"""Up to this many tokens * vocabulary (128 MiB of float32) a softmax is kept for backward, twice as
many of a type of half the size."""


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
    # Selected before the product: 0 * inf would be NaN.
    return (weight_N * torch.where(weight_N != 0, value_N, 0)).sum()


def row_sums(
    value_N: Tensor, row_N: Tensor, num_rows: int, counted_N: Tensor | None = None
) -> Tensor:
    """`sum_B` of `value_N` over the tokens of each row, or over those that `counted_N` (bool) says.

    `row_N` is the row (int64 in [0, num_rows)) of each token. A token that does not count adds
    nothing, whatever its value, and gets no gradient. Raises ValueError for shapes that differ.
    """
    same_shape(value_N=value_N, row_N=row_N, counted_N=counted_N)
    if counted_N is not None:
        value_N = torch.where(counted_N, value_N, 0)
    # [N] -> [B]: the sum of the tokens of each row.
    return value_N.new_zeros(num_rows).index_add(0, row_N, value_N)


def row_means(value_N: Tensor, row_N: Tensor, num_rows: int, counted_N: Tensor) -> Tensor:
    """`mean_B` of `value_N` over the counted tokens of each row, 0 where a row has none.

    Arguments and errors as in `row_sums`.
    """
    count_B = row_sums(counted_N.to(value_N.dtype), row_N, num_rows)
    # A row that has no counted token is 0 / 1, not 0 / 0.
    return row_sums(value_N, row_N, num_rows, counted_N) / count_B.clamp(min=1)


def bounded(log_ratio_N: Tensor, bound: float = MAX_LOG_RATIO) -> Tensor:
    """The log ratio as it may be exponentiated: at most `bound`, where it has no gradient.

    The one place that keeps exp from overflowing. Below the bound nothing changes, to the last bit;
    the lower end needs none, since exp goes to 0 there. NaN stays NaN.
    """
    return log_ratio_N.clamp(max=bound)


def bounded_count(
    log_ratio_N: Tensor, counted_N: Tensor | None = None, bound: float = MAX_LOG_RATIO
) -> Tensor:
    """How many of the tokens `bounded` changes, of all or of those that `counted_N` (bool) says."""
    beyond_N = log_ratio_N.detach() > bound
    if counted_N is not None:
        beyond_N = beyond_N & counted_N
    return beyond_N.sum().to(log_ratio_N.dtype)


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
        logp_N = hidden_ND.new_empty(num_tokens, dtype=softmax_dtype(hidden_ND))
        entropy_N = torch.empty_like(logp_N)
        kept_NV = hidden_ND.new_empty(num_tokens, vocabulary) if keep_softmax else None
        # A kept softmax needs no buffer: chunks are projected straight into their rows of it.
        buffer_CV = kept_NV
        if buffer_CV is None:
            buffer_CV = chunk_buffer(hidden_ND, vocabulary, max_elements)
        block_RV, wide = block_buffer(buffer_CV), wide_buffer(buffer_CV)
        for chunk in token_chunks(num_tokens, vocabulary, max_elements, hidden_ND.dtype):
            size = chunk.stop - chunk.start
            logits_CV = buffer_CV[:size] if kept_NV is None else kept_NV[chunk]
            project(hidden_ND[chunk], head_VD, logits_CV)
            for rows in row_blocks(logits_CV):
                at = slice(chunk.start + rows.start, chunk.start + rows.stop)
                z_RV = finish(logits_CV[rows], bias_V, temperature, wide)
                lp_RV = block_RV[: rows.stop - rows.start]
                torch.log_softmax(z_RV, -1, out=lp_RV)
                # [R, V] -> [R]: of each row the entry at its target.
                logp_N[at] = lp_RV.gather(1, targets_N[at, None])[:, 0]
                # Over the logits, so that these rows of `kept_NV` now hold probabilities.
                p_RV = torch.exp(lp_RV, out=z_RV)
                entropy_N[at] = torch.linalg.vecdot(p_RV, lp_RV).neg_()
                if kept_NV is not None:
                    # p - onehot(y) is all that the backward pass needs of the softmax.
                    _minus_one_at(p_RV, targets_N[at])
                    narrow_into(kept_NV[at], p_RV)
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, targets_N, kept_NV)
        ctx.temperature, ctx.max_elements = temperature, max_elements
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, bias_V, targets_N, kept_NV = ctx.saved_tensors
        num_tokens, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
        # d logp[y] / d logits = -(p - onehot(y)); the sign goes with the scale.
        scale_N = grads[0] / -ctx.temperature
        sums = HeadGradients(hidden_ND, head_VD, bias_V, ctx.needs_input_grad[:3])
        chunks = token_chunks(num_tokens, vocabulary, ctx.max_elements, hidden_ND.dtype)
        if kept_NV is not None:
            if softmax_dtype(hidden_ND) != hidden_ND.dtype and num_tokens:
                # One product instead of a sum of rounded ones.
                chunks = iter([slice(0, num_tokens)])
            # Only read here, so that a retained graph can be walked again.
            for chunk in chunks:
                sums.add(chunk, kept_NV[chunk], scale_N[chunk])
            return (*sums.result(), None, None, None, None)
        buffer_CV = chunk_buffer(hidden_ND, vocabulary, ctx.max_elements)
        block_RV, wide = block_buffer(buffer_CV), wide_buffer(buffer_CV)
        for chunk in chunks:
            grad_CV = buffer_CV[: chunk.stop - chunk.start]
            project(hidden_ND[chunk], head_VD, grad_CV)
            for rows in row_blocks(grad_CV):
                at = slice(chunk.start + rows.start, chunk.start + rows.stop)
                p_RV = block_RV[: rows.stop - rows.start]
                z_RV = finish(grad_CV[rows], bias_V, ctx.temperature, wide)
                torch.softmax(z_RV, -1, out=p_RV)
                _minus_one_at(p_RV, targets_N[at])
                grad_CV[rows] = p_RV
            sums.add(chunk, grad_CV, scale_N[chunk])
        return (*sums.result(), None, None, None, None)


def _minus_one_at(p_NV: Tensor, targets_N: Tensor) -> None:
    """Subtract 1 from each row of `p_NV` at its target, in place."""
    minus_one_N1 = p_NV.new_full((1, 1), -1.0).expand(len(targets_N), 1)
    p_NV.scatter_add_(1, targets_N[:, None], minus_one_N1)


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
    to the hidden states' type. Up to `N * V = 2^25` (2^26 in bfloat16), or `max_elements` if that
    is less, the softmax is kept for the backward pass in this type; beyond that it is computed
    again there, a chunk at a time (`posttrain.losses.projection.token_chunks`), which bounds the
    memory at the price of one more projection.

    Returns `(logp_N, entropy_N)`: `logp_N` is differentiable with respect to hidden states, head
    and bias; `entropy_N` is detached. Raises ValueError if shapes do not fit or `temperature` is
    not positive.
    """
    check_projection(hidden_ND, head_VD, bias_V, temperature)
    same_shape(targets_N=targets_N, hidden_N=hidden_ND[:, 0])
    needs_grad = hidden_ND.requires_grad or head_VD.requires_grad
    needs_grad = needs_grad or (bias_V is not None and bias_V.requires_grad)
    most = min(max_elements, _KEEP_ELEMENTS * per_four_bytes(hidden_ND.dtype))
    fits = hidden_ND.shape[0] * head_VD.shape[0] <= most
    # Asked here, because grad mode is always off within the forward of a Function.
    keep_softmax = torch.is_grad_enabled() and needs_grad and fits
    logp_N, entropy_N = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND,
        # Cast outside of the Function, so that autograd casts the gradient back.
        head_VD.to(hidden_ND.dtype),
        bias_V,
        targets_N,
        temperature,
        max_elements,
        keep_softmax,
    )
    return cast(Tensor, logp_N), cast(Tensor, entropy_N)


def cross_entropy(logp_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Metrics]:
    """Supervised fine-tuning: sum of `-weight * logp` (nats) over tokens.

    `logp_N` are the log-probabilities of the demonstrated tokens (`token_logprobs`), `weight_N`
    their weights (`aggregation_weights`, or 0 for a token that does not count). Metrics: `nll`, the
    unweighted sum of `-logp` over counted tokens.
    """
    same_shape(logp_N=logp_N, weight_N=weight_N)
    return -weighted_sum(logp_N, weight_N), {"nll": active_sum(-logp_N, weight_N)}


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
    # [N] -> [B] -> [N]: the tokens of each row, then 1 / that at each of its tokens. An empty row
    # has an infinite reciprocal, which no token picks.
    length_B = torch.bincount(row_N, minlength=num_rows)
    weight_N = length_B.to(torch.float32).reciprocal()[row_N]
    return weight_N, float(torch.count_nonzero(length_B))


def kl_estimate(logp_N: Tensor, ref_logp_N: Tensor, *, estimator: Estimator) -> Tensor:
    """KL(student || reference) per sampled token, from the log-probabilities of that token alone.

    With `d = logp - ref_logp`: k1 = d, k2 = d**2 / 2, k3 = exp(-d) - 1 + d (Schulman,
    "Approximating KL divergence", 2020). k1 and k3 are unbiased VALUES. Gradients are another
    matter: see `kl_penalty`. Differentiable in both arguments.

    k3 of a token that the reference finds more than `MAX_KL_GAP` nats likelier is that of this gap,
    a constant without a gradient: one such token would else be the whole loss.
    """
    known_choice("estimator", estimator, Estimator)
    same_shape(logp_N=logp_N, ref_logp_N=ref_logp_N)
    difference_N = logp_N - ref_logp_N
    if estimator == "k1":
        return difference_N
    if estimator == "k2":
        return 0.5 * difference_N.square()
    return _k3(difference_N)


def _k3(difference_N: Tensor) -> Tensor:
    # Both terms of the bounded gap: the second alone would push such a token further away.
    gap_N = bounded(-difference_N, MAX_KL_GAP)
    # expm1, because exp(-d) - 1 loses its digits where the policies nearly agree.
    return torch.expm1(gap_N) - gap_N


def kl_bounded(
    logp_N: Tensor, ref_logp_N: Tensor, weight_N: Tensor | None = None, *, estimator: str
) -> Tensor:
    """How many tokens have their k3 bounded (`kl_estimate`): of all, or of those of non-zero
    weight. 0 with `k1` and `k2`, which exponentiate nothing."""
    if estimator in ("k1", "k2"):
        return logp_N.new_zeros(())
    counted_N = None if weight_N is None else weight_N != 0
    return bounded_count(ref_logp_N - logp_N, counted_N, MAX_KL_GAP)


def kl_penalty(
    logp_N: Tensor, ref_logp_N: Tensor, weight_N: Tensor, *, estimator: Estimator
) -> tuple[Tensor, Metrics]:
    """Sum of `weight * k(logp, ref_logp)`: a KL penalty towards a reference, as a loss.

    What is descended, in expectation over tokens sampled from the student:

    - `k2`: the gradient of KL(student || reference).
    - `k3`: the gradient of KL(reference || student), the forward KL (GRPO's choice).
    - `k1`: nothing. Its expected gradient is E[grad log p] = 0, so it is refused here.

    As a part of the reward all three are usable (`kl_estimate`, detached).
    `ref_logp_N` is a constant. Metrics: `kl`, the unweighted sum of the estimates, and
    `kl_bounded`, how many of them are bounded. Raises ValueError for `k1` and for an unknown
    estimator.
    """
    known_choice("estimator", estimator, Estimator)
    if estimator == "k1":
        raise ValueError(
            "estimator: 'k1' as a loss has zero expected gradient (the mean of grad log p over "
            "samples of p is zero); k1 belongs in the reward. Choices: k2, k3 as a loss; k1, k2, "
            "k3 in the reward"
        )
    same_shape(logp_N=logp_N, ref_logp_N=ref_logp_N, weight_N=weight_N)
    kl_N = kl_estimate(logp_N, ref_logp_N.detach(), estimator=estimator)
    return weighted_sum(kl_N, weight_N), {
        "kl": active_sum(kl_N, weight_N),
        "kl_bounded": kl_bounded(logp_N, ref_logp_N, weight_N, estimator=estimator),
    }


def unbiased_kl_penalty(
    logp_N: Tensor, old_logp_N: Tensor, ref_logp_N: Tensor, weight_N: Tensor
) -> tuple[Tensor, Metrics]:
    """Sum of `weight * (p / p_old) * k3(logp, ref_logp)`: unbiased in value and gradient.

    In expectation over tokens sampled from the old policy (the one that sampled, or the one before
    the updates on the batch) it is KL(student || reference), and its gradient is the gradient of
    that (DeepSeek-V3.2, arXiv 2512.02556, section 3.1, "unbiased KL estimate"). The ratio carries
    gradient even where it is exactly 1: then d * grad log p is descended, with d = logp - ref_logp.

    `old_logp_N` and `ref_logp_N` are constants. Metrics: `kl`, the unweighted sum of the estimates,
    and `kl_bounded`, how many tokens have their k3 bounded; the ratio is bounded, too (`bounded`).
    Raises ValueError for shapes that differ.
    """
    same_shape(logp_N=logp_N, old_logp_N=old_logp_N, ref_logp_N=ref_logp_N, weight_N=weight_N)
    active_N = weight_N != 0
    # Selected before exp: an overflow at weight 0 would be NaN in the backward pass.
    ratio_N = bounded(torch.where(active_N, logp_N - old_logp_N.detach(), 0)).exp()
    difference_N = torch.where(active_N, logp_N - ref_logp_N.detach(), 0)
    kl_N = ratio_N * _k3(difference_N)
    return weighted_sum(kl_N, weight_N), {
        "kl": active_sum(kl_N, weight_N),
        "kl_bounded": kl_bounded(logp_N, ref_logp_N, weight_N, estimator="unbiased"),
    }
