"""Log-probabilities over a part of the vocabulary: the policy that top-p sampling draws from.

Shape suffixes: N flat response tokens of all rows, D hidden size, V vocabulary, C tokens of one
chunk, F ids of the nuclei of all tokens, token after token.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.losses.ops import same_shape
from posttrain.losses.projection import (
    MAX_ELEMENTS,
    check_projection,
    softmax_dtype,
    token_chunks,
)


def nucleus_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    ids_F: Tensor,
    count_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    max_elements: int = MAX_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy (nats), both over the token's nucleus alone.

    As `posttrain.losses.ops.token_logprobs`, with a softmax over the first `count_N[0]` of `ids_F`
    for the first token, the next `count_N[1]` for the second, and so on (Keep Sampling Mask:
    DeepSeek-V3.2, arXiv 2512.02556, section 3.1). Other ids get no gradient. A target outside its
    nucleus has log-probability -inf. Of the logits one chunk of tokens exists at a time;
    the backward pass computes them again.

    Returns `(logp_N, entropy_N)`: `logp_N` is differentiable with respect to hidden states, head
    and bias; `entropy_N` is detached. Raises ValueError if shapes do not fit or `temperature` is
    not positive.
    """
    check_projection(hidden_ND, head_VD, bias_V, temperature)
    same_shape(targets_N=targets_N, hidden_N=hidden_ND[:, 0], count_N=count_N)
    if int(count_N.sum()) != len(ids_F):
        raise ValueError(f"count_N sums to {int(count_N.sum())}, but there are {len(ids_F)} ids_F")
    end_N = count_N.cumsum(0).tolist()
    # Without tokens there is no chunk, and `cat` wants at least one tensor.
    none_N = hidden_ND.new_empty(0, dtype=softmax_dtype(hidden_ND))
    logp, entropy = [none_N], [none_N]
    for chunk in token_chunks(len(targets_N), head_VD.shape[0], max_elements):
        first = end_N[chunk.start - 1] if chunk.start else 0
        found = checkpoint(
            _chunk,
            hidden_ND[chunk],
            head_VD,
            bias_V,
            targets_N[chunk],
            ids_F[first : end_N[chunk.stop - 1]].long(),
            count_N[chunk],
            temperature,
            use_reentrant=False,
            # Nothing in a chunk is random.
            preserve_rng_state=False,
        )
        logp.append(found[0])
        entropy.append(found[1])
    return torch.cat(logp), torch.cat(entropy)


def _chunk(
    hidden_CD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    targets_C: Tensor,
    ids_F: Tensor,
    count_C: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    logits_CV = (hidden_CD @ head_VD.to(hidden_CD.dtype).T).to(softmax_dtype(hidden_CD))
    if bias_V is not None:
        logits_CV = logits_CV + bias_V
    # [C] -> [F]: to which token of the chunk each id belongs.
    token_F = torch.arange(len(count_C), device=ids_F.device).repeat_interleave(count_C)
    dropped_CV = torch.ones_like(logits_CV, dtype=torch.bool)
    dropped_CV[token_F, ids_F] = False
    logits_CV = (logits_CV / temperature).masked_fill(dropped_CV, -torch.inf)
    logp_CV = torch.log_softmax(logits_CV, -1)
    seen_CV = logp_CV.detach()
    # Outside the nucleus p log p would be 0 * -inf.
    entropy_C = -(seen_CV.exp() * seen_CV.masked_fill(dropped_CV, 0)).sum(-1)
    return logp_CV.gather(1, targets_C[:, None])[:, 0], entropy_C
