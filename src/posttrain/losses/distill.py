"""On-policy distillation: a divergence of student and teacher, on the student's own tokens.

Three estimators of one objective, D = sum_v p(v) log(p(v) / t(v)) at every token of a response that
the student p sampled, with t the teacher; the last of them knows two other divergences too:

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

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from posttrain.losses.divergence import (
    Divergence,
    TeacherStates,
    full_vocabulary_sum,
    top_k_sum,
    with_gradients,
)
from posttrain.losses.ops import Metrics, active_sum, known_choice, same_shape, weighted_sum
from posttrain.losses.projection import (
    MAX_ELEMENTS,
    block_buffer,
    check_projection,
    chunk_buffer,
    finish,
    project,
    row_blocks,
    softmax_dtype,
    token_chunks,
    wide_buffer,
)

PerToken = dict[str, Tensor]
"""Detached values per token, for reports: `kl` and `entropy`."""

JSD_BETA = 0.5
"""The symmetric Jensen-Shannon divergence."""


def sampled_token(
    logp_N: Tensor,
    teacher_logp_N: Tensor,
    weight_N: Tensor,
    *,
    advantage_clip: float | None,
    correction_N: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Policy gradient on the sampled token: sum of `-weight * correction * A * logp`.

    A = clip(sg[teacher_logp - logp], -advantage_clip, +advantage_clip): the log ratio is a
    constant, and its mean gradient over tokens sampled from the student is that of
    KL(student || teacher) at the token (no credit for later tokens: discount 0). The MOPD paper
    (arXiv 2606.30406, policy-gradient arm) clips at 5. `correction_N` is an importance correction
    (MiMo-V2-Flash, arXiv 2601.02780, Eq. 8). The advantage of a verifiable reward (Eq. 9 there) is
    a `posttrain.losses.policy.policy_gradient` of its own beside this loss.

    Metrics, over the tokens of non-zero weight: `advantage`, `advantage_abs`, `advantage_square`,
    of the log ratio before the clip (so `-advantage` estimates the reverse KL), and
    `clipped`, how many tokens the clip changed. Raises ValueError if `advantage_clip` is not
    positive or shapes differ.
    """
    same_shape(
        logp_N=logp_N,
        teacher_logp_N=teacher_logp_N,
        weight_N=weight_N,
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
    if correction_N is not None:
        advantage_N = advantage_N * correction_N.detach()
    return -weighted_sum(advantage_N * logp_N, weight_N), metrics


def full_vocabulary(
    hidden_ND: Tensor,
    head_VD: Tensor,
    teachers: Sequence[TeacherStates],
    weight_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    divergence: Divergence = "reverse_kl",
    jsd_beta: float = JSD_BETA,
    temperature: float = 1.0,
    max_elements: int = MAX_ELEMENTS,
) -> tuple[Tensor, Metrics, PerToken]:
    """Sum over tokens of `weight * divergence(student, teacher)`, exact over the whole vocabulary.

    The first `len(teachers[0].hidden_NE)` tokens belong to the first teacher, the next ones to the
    second, and so on; a teacher may have none. `divergence`, of student p and teacher t:

    - `reverse_kl`: KL(p || t).
    - `forward_kl`: KL(t || p).
    - `jsd`: `beta KL(t || m) + (1 - beta) KL(p || m)` with `m = (1 - beta) p + beta t` and
      0 < beta < 1 (GKD, arXiv 2306.13649, Eq. 1, with the teacher as P; TRL's convention). Over
      beta it tends to the forward KL as beta goes to 0, over 1 - beta to the reverse KL as beta
      goes to 1; 1/2 is symmetric. Only here is `jsd_beta` read.

    Both softmaxes are of `logits / temperature`. Gradients of `hidden_ND`, `head_VD` and `bias_V`
    are computed in the forward pass by chunks of tokens, at most `max_elements // V` each
    (`posttrain.losses.projection.token_chunks`); teachers get none. Their hidden sizes may differ,
    their vocabulary may not.

    Metrics over the tokens of non-zero weight, in nats: `kl`, the reverse KL whatever `divergence`
    is, and `entropy` (student); the same per token, detached. Raises ValueError if shapes do not
    fit, if `temperature` is not positive, for another `divergence`, or for a `jsd_beta` outside of
    (0, 1).
    """
    known_choice("divergence", divergence, Divergence)
    if not 0 < jsd_beta < 1:
        raise ValueError(
            f"jsd_beta: {jsd_beta} must be above 0 and below 1; the ends are the divergences "
            "forward_kl and reverse_kl"
        )
    check_projection(hidden_ND, head_VD, bias_V, temperature)
    # A column of [N, D] stands for its number of tokens, one of [V, D] for the vocabulary.
    same_shape(weight_N=weight_N, hidden_N=hidden_ND[:, 0])
    for teacher in teachers:
        # A closed head is not opened for its shape.
        shape = tuple(teacher.head_VE.shape)
        teacher_head_VE = teacher.hidden_NE.new_empty(()).expand(shape)
        check_projection(teacher.hidden_NE, teacher_head_VE, teacher.bias_V, temperature)
        same_shape(head_V=head_VD[:, 0], teacher_head_V=teacher_head_VE[:, 0])
    num_scored = sum(len(teacher.hidden_NE) for teacher in teachers)
    if num_scored != len(hidden_ND):
        raise ValueError(
            f"teachers have {num_scored} hidden states together, the student has {len(hidden_ND)}; "
            "each token needs one of exactly one teacher"
        )
    compute = partial(
        full_vocabulary_sum,
        teachers=teachers,
        weight_N=weight_N.detach(),
        divergence=divergence,
        beta=jsd_beta,
        temperature=temperature,
        max_elements=max_elements,
    )
    loss, kl_N, entropy_N = with_gradients(compute, hidden_ND, head_VD, bias_V)
    metrics = {"kl": active_sum(kl_N, weight_N), "entropy": active_sum(entropy_N, weight_N)}
    return loss, metrics, {"kl": kl_N, "entropy": entropy_N}


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
    block_RV, wide = block_buffer(buffer_CV), wide_buffer(buffer_CV)
    for chunk in token_chunks(num_tokens, vocabulary, max_elements, buffer_CV.dtype):
        logits_CV = buffer_CV[: chunk.stop - chunk.start]
        project(teacher_hidden_NE[chunk], head_VE, logits_CV)
        for rows in row_blocks(logits_CV):
            at = slice(chunk.start + rows.start, chunk.start + rows.stop)
            logp_RV = block_RV[: rows.stop - rows.start]
            z_RV = finish(logits_CV[rows], bias_V, temperature, wide)
            torch.log_softmax(z_RV, -1, out=logp_RV)
            # [R, V] -> [R, K], likeliest first.
            logp_NK[at], ids_NK[at] = logp_RV.topk(k, -1)
    return ids_NK, logp_NK


def top_k(
    hidden_ND: Tensor,
    head_VD: Tensor,
    top_ids_NK: Tensor,
    top_logp_NK: Tensor,
    weight_N: Tensor,
    *,
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
    `student_mass`, `teacher_mass` (probability on the set). Per token, detached: `kl`, `entropy`.
    Raises ValueError if shapes do not fit or `temperature` is not positive.
    """
    check_projection(hidden_ND, head_VD, bias_V, temperature)
    same_shape(top_ids_NK=top_ids_NK, top_logp_NK=top_logp_NK)
    same_shape(weight_N=weight_N, hidden_N=hidden_ND[:, 0], top_ids_N=top_ids_NK[:, 0])
    compute = partial(
        top_k_sum,
        top_ids_NK=top_ids_NK,
        top_logp_NK=top_logp_NK.detach(),
        weight_N=weight_N.detach(),
        temperature=temperature,
        max_elements=max_elements,
    )
    loss, kl_N, entropy_N, mass_N = with_gradients(compute, hidden_ND, head_VD, bias_V)
    metrics = {
        "kl": active_sum(kl_N, weight_N),
        "entropy": active_sum(entropy_N, weight_N),
        "student_mass": active_sum(mass_N, weight_N),
        "teacher_mass": active_sum(top_logp_NK.exp().sum(-1), weight_N),
    }
    return loss, metrics, {"kl": kl_N, "entropy": entropy_N}
