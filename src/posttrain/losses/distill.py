"""On-policy distillation: reverse KL from the student to its teacher, on the student's own tokens.

Three estimators of one objective, D = sum_v p(v) log(p(v) / t(v)) at every token of a response that
the student p sampled, with t the teacher:

| name | needs of the teacher, per token | gradient |
|---|---|---|
| `sampled_token` | log-probability of the sampled token | unbiased (at clip None), noisy |
| `top_k` | its k likeliest tokens | exact on that set; mass outside it is only held in total |
| `full_vocabulary` | its hidden state and head | exact |

Left out: log(p/t) of sampled tokens as a differentiable loss ("k1 loss"). Its expected gradient is
zero, so it must be an advantage, which is what `sampled_token` makes of it.

Shape suffixes: N flat response tokens of all rows, D student's and E teacher's hidden size,
V vocabulary, K top-k.
"""

import torch
from torch import Tensor

from posttrain.losses.divergence import FullVocabularyKL, TopKKL
from posttrain.losses.ops import (
    MAX_ELEMENTS,
    Metrics,
    active_sum,
    check_projection,
    chunk_buffer,
    project,
    same_shape,
    softmax_dtype,
    token_chunks,
    weighted_sum,
)

PerToken = dict[str, Tensor]
"""Detached values per token, for reports: `kl`, `entropy` and, with targets, `logp`."""


def sampled_token(
    logp_N: Tensor,
    teacher_logp_N: Tensor,
    weight_N: Tensor,
    *,
    advantage_clip: float | None,
    extra_advantage_N: Tensor | None = None,
    correction_N: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Policy gradient on the sampled token: sum of `-weight * correction * A * logp`.

    A = clip(sg[teacher_logp - logp], -advantage_clip, +advantage_clip) + extra_advantage: the log
    ratio is a constant, and its mean gradient over tokens sampled from the student is that of
    KL(student || teacher) at the token (no credit for later tokens: discount 0). The MOPD paper
    (arXiv 2606.30406, policy-gradient arm) clips at 5. `extra_advantage_N` is a verifiable reward's
    advantage times its weight (MiMo-V2-Flash, arXiv 2601.02780, Eq. 9), added after the clip;
    `correction_N` is the importance correction of Eq. 8 and multiplies the whole advantage.

    Metrics, over the tokens of non-zero weight: `advantage`, `advantage_abs`, `advantage_square`,
    of the log ratio before clip and extra (so `-advantage` estimates the reverse KL), and
    `clipped`, how many tokens the clip changed. Raises ValueError if `advantage_clip` is not
    positive or shapes differ.
    """
    same_shape(
        logp_N=logp_N,
        teacher_logp_N=teacher_logp_N,
        weight_N=weight_N,
        extra_advantage_N=extra_advantage_N,
        correction_N=correction_N,
    )
    if advantage_clip is not None and not advantage_clip > 0:
        raise ValueError(f"advantage_clip: {advantage_clip} must be above 0, or None for no clip")
    log_ratio_N = (teacher_logp_N - logp_N).detach()
    advantage_N = log_ratio_N
    if advantage_clip is not None:
        advantage_N = log_ratio_N.clamp(-advantage_clip, advantage_clip)
    metrics = {
        "advantage": active_sum(log_ratio_N, weight_N),
        "advantage_abs": active_sum(log_ratio_N.abs(), weight_N),
        "advantage_square": active_sum(log_ratio_N.square(), weight_N),
        "clipped": active_sum((advantage_N != log_ratio_N).to(logp_N.dtype), weight_N),
    }
    if extra_advantage_N is not None:
        advantage_N = advantage_N + extra_advantage_N.detach()
    if correction_N is not None:
        advantage_N = advantage_N * correction_N.detach()
    return -weighted_sum(advantage_N * logp_N, weight_N), metrics


def full_vocabulary(
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    weight_N: Tensor,
    *,
    targets_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    temperature: float = 1.0,
    max_elements: int = MAX_ELEMENTS,
) -> tuple[Tensor, Metrics, PerToken]:
    """Sum over tokens of `weight * KL(student || teacher)`, exact over the whole vocabulary.

    Both softmaxes are of `logits / temperature`. Gradients of `hidden_ND`, `head_VD` and `bias_V`
    are computed in the forward pass by chunks of `max_elements // V` tokens; the teacher gets none.
    Its hidden size may differ, its vocabulary may not. `targets_N` (int64) are the sampled tokens
    and do not change the loss.

    Metrics over the tokens of non-zero weight: `kl`, `entropy` (student), both in nats. Per token,
    detached: `kl`, `entropy` and, with targets, `logp` and `teacher_logp`.
    Raises ValueError if shapes do not fit or `temperature` is not positive.
    """
    check_projection(hidden_ND, head_VD, bias_V, temperature)
    check_projection(teacher_hidden_NE, teacher_head_VE, teacher_bias_V, temperature)
    same_shape(weight_N=weight_N, hidden_N=hidden_ND[:, 0], targets_N=targets_N)
    same_shape(hidden_N=hidden_ND[:, 0], teacher_hidden_N=teacher_hidden_NE[:, 0])
    same_shape(head_V=head_VD[:, 0], teacher_head_V=teacher_head_VE[:, 0])
    outputs: tuple[Tensor, ...] = FullVocabularyKL.apply(  # type: ignore[no-untyped-call]
        hidden_ND,
        head_VD.to(hidden_ND.dtype),
        bias_V,
        teacher_hidden_NE.detach(),
        teacher_head_VE.detach().to(teacher_hidden_NE.dtype),
        teacher_bias_V,
        weight_N.detach(),
        targets_N,
        temperature,
        max_elements,
        torch.is_grad_enabled(),
    )
    loss, kl_N, entropy_N, logp_N, teacher_logp_N = outputs
    per_token = {"kl": kl_N, "entropy": entropy_N}
    if targets_N is not None:
        per_token |= {"logp": logp_N, "teacher_logp": teacher_logp_N}
    metrics = {"kl": active_sum(kl_N, weight_N), "entropy": active_sum(entropy_N, weight_N)}
    return loss, metrics, per_token


@torch.no_grad()
def teacher_top_k_targets(
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    k: int,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    max_elements: int = MAX_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """The teacher's k likeliest tokens and their log-probabilities, `(ids_NK int64, logp_NK)`.

    The log-probabilities are of the whole softmax, not renormalised over the k. Likeliest first.
    Raises ValueError unless 1 <= k <= V, if shapes do not fit or `temperature` is not positive.
    """
    check_projection(teacher_hidden_NE, teacher_head_VE, bias_V, temperature)
    num_tokens, vocabulary = teacher_hidden_NE.shape[0], teacher_head_VE.shape[0]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k: {k} must be between 1 and the vocabulary size {vocabulary}")
    head_VE = teacher_head_VE.to(teacher_hidden_NE.dtype)
    ids_NK = torch.empty(num_tokens, k, dtype=torch.int64, device=teacher_hidden_NE.device)
    logp_NK = ids_NK.new_empty(num_tokens, k, dtype=softmax_dtype(teacher_hidden_NE))
    buffer_CV = chunk_buffer(teacher_hidden_NE, vocabulary, max_elements)
    for chunk in token_chunks(num_tokens, vocabulary, max_elements):
        logits_CV = buffer_CV[: chunk.stop - chunk.start]
        project(teacher_hidden_NE[chunk], head_VE, bias_V, temperature, logits_CV)
        logp_NK[chunk], ids_NK[chunk] = torch.log_softmax(logits_CV, -1).topk(k, -1)
    return ids_NK, logp_NK


def top_k(
    hidden_ND: Tensor,
    head_VD: Tensor,
    top_ids_NK: Tensor,
    top_logp_NK: Tensor,
    weight_N: Tensor,
    *,
    targets_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    max_elements: int = MAX_ELEMENTS,
) -> tuple[Tensor, Metrics, PerToken]:
    """Sum over tokens of `weight * sum_{v in top k of teacher} p log(p / t) - p + t`.

    The `- p + t` terms make every term non-negative and `p = t` on the set the only minimum (MOPD,
    arXiv 2606.30406, top-k arm, k = 64); without them the loss falls by moving the student's mass
    off the set. With k = V this is `full_vocabulary`. `top_ids_NK` (int64, distinct in a row) and
    `top_logp_NK` come from `teacher_top_k_targets` at the same temperature; they are constants.
    Gradients are computed in the forward pass, as in `full_vocabulary`.

    Metrics over the tokens of non-zero weight: `kl` (this divergence), `entropy` (student),
    `student_mass`, `teacher_mass` (probability on the set). Per token, detached: `kl`, `entropy`
    and, with `targets_N`, `logp` (the teacher's is unknown outside the set). Raises ValueError if
    shapes do not fit or `temperature` is not positive.
    """
    check_projection(hidden_ND, head_VD, bias_V, temperature)
    same_shape(top_ids_NK=top_ids_NK, top_logp_NK=top_logp_NK)
    same_shape(
        weight_N=weight_N,
        hidden_N=hidden_ND[:, 0],
        targets_N=targets_N,
        top_ids_N=top_ids_NK[:, 0],
    )
    outputs: tuple[Tensor, ...] = TopKKL.apply(  # type: ignore[no-untyped-call]
        hidden_ND,
        head_VD.to(hidden_ND.dtype),
        bias_V,
        top_ids_NK,
        top_logp_NK.detach(),
        weight_N.detach(),
        targets_N,
        temperature,
        max_elements,
        torch.is_grad_enabled(),
    )
    loss, kl_N, entropy_N, logp_N, mass_N = outputs
    per_token = {"kl": kl_N, "entropy": entropy_N}
    if targets_N is not None:
        per_token["logp"] = logp_N
    metrics = {
        "kl": active_sum(kl_N, weight_N),
        "entropy": active_sum(entropy_N, weight_N),
        "student_mass": active_sum(mass_N, weight_N),
        "teacher_mass": active_sum(top_logp_NK.exp().sum(-1), weight_N),
    }
    return loss, metrics, per_token
