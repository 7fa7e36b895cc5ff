"""Preference losses: DPO, length-normalised DPO, SimPO, IPO, KTO, and cross-entropy on the chosen.

A response has a score: the sum over its counted tokens, or their mean, of `log p(y) - log q(y)`,
with `p` the policy and `q` a frozen reference (`response_scores`; without a reference `log p(y)`).
Every loss is a function of scores alone, and `beta * score` is the reward that the policy implies.

| loss | score | function |
|---|---|---|
| DPO (arXiv 2305.18290) | sum | `dpo` |
| length-normalised DPO (Tülu 3, arXiv 2411.15124) | mean | `dpo` |
| SimPO (arXiv 2405.14734) | mean, no reference | `dpo` with `gamma` |
| IPO (arXiv 2310.12036) | mean | `ipo` |
| KTO (arXiv 2402.01306) | sum | `kto` with `kto_baseline` |

As elsewhere, losses and metrics are sums, here over pairs (over responses in `kto`), and the caller
divides by the number of them in the whole step.

Shape suffixes: N flat response tokens of all rows, B rows, P pairs, C desirable rows, D undesirable
rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.ops import Metrics, row_sums, same_shape


def response_scores(
    logp_N: Tensor,
    counted_N: Tensor,
    row_N: Tensor,
    *,
    num_rows: int,
    ref_logp_B: Tensor | None = None,
    mean: bool = False,
) -> Tensor:
    """`score_B`: sum over the counted tokens of `log p - log q`; `mean` divides it by their number.

    `logp_N` is differentiable. `ref_logp_B` is a constant: the reference's `row_sums` over the same
    tokens, or None for no reference. A row without a counted token scores 0 as a mean. Masking is
    Llama 3's (arXiv 2407.21783, section 4.1.4): tokens that chosen and rejected have in common,
    such as the end of a turn, would be pushed up and down at once.
    """
    # [N] -> [B]: over the counted tokens of each response.
    score_B = row_sums(logp_N, row_N, num_rows, counted_N)
    if ref_logp_B is not None:
        same_shape(score_B=score_B, ref_logp_B=ref_logp_B)
        score_B = score_B - ref_logp_B.detach()
    if mean:
        count_B = row_sums(torch.ones_like(logp_N), row_N, num_rows, counted_N)
        score_B = score_B / count_B.clamp(min=1)
    return score_B


def dpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    beta: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Sum over pairs of `-(1 - s) log sigmoid(m) - s log sigmoid(-m)`, `m = beta (c - r) - gamma`.

    `chosen_P` (c) and `rejected_P` (r) are the scores of the two responses of each pair, `s` is
    `label_smoothing`: the share of pairs that are thought to be labelled the wrong way round
    (conservative DPO, Mitchell, "A note on DPO with noisy preferences", 2023).

    - Sums of log ratios: DPO (arXiv 2305.18290, Eq. 7).
    - Means of log ratios: length-normalised DPO (Tülu 3, arXiv 2411.15124, section 5).
    - Means of log-probs and a margin `gamma`: SimPO (arXiv 2405.14734, Eq. 6).

    Metrics: see `pair_metrics`. Raises ValueError for a `beta` that is not positive, a
    `label_smoothing` outside [0, 0.5), or shapes that differ.
    """
    _check(beta, chosen_P=chosen_P, rejected_P=rejected_P)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: {label_smoothing} must be in [0, 0.5); from 0.5 on the rejected "
            "response would be preferred"
        )
    margin_P = beta * (chosen_P - rejected_P) - gamma
    # logsigmoid, because the sigmoid of a very negative margin underflows to 0.
    loss_P = -(1 - label_smoothing) * logsigmoid(margin_P)
    if label_smoothing > 0:
        loss_P = loss_P - label_smoothing * logsigmoid(-margin_P)
    return loss_P.sum(), pair_metrics(chosen_P, rejected_P, beta=beta)


def ipo(chosen_P: Tensor, rejected_P: Tensor, *, beta: float) -> tuple[Tensor, Metrics]:
    """IPO: sum over pairs of `((c - r) - 1 / (2 beta))^2` (arXiv 2310.12036, Eq. 17; beta is tau).

    The scores are means over tokens: the paper writes sums, whose square grows with the length; its
    results come from means (so TRL, whose authors asked). Metrics: see `pair_metrics`. Raises
    ValueError for a `beta` that is not positive or shapes that differ.
    """
    _check(beta, chosen_P=chosen_P, rejected_P=rejected_P)
    loss_P = (chosen_P - rejected_P - 1 / (2 * beta)).square()
    return loss_P.sum(), pair_metrics(chosen_P, rejected_P, beta=beta)


def kto(
    desirable_C: Tensor,
    undesirable_D: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """KTO: sum over responses, which need not be pairs (arXiv 2402.01306, section 4.1).

    `desirable_weight * (1 - sigmoid(beta * (score - z)))` for desirable responses and
    `undesirable_weight * (1 - sigmoid(beta * (z - score)))` for the others, with `z` the constant
    `baseline` (0-d, `kto_baseline`) of the whole step. Metrics: `reward_chosen` and
    `reward_rejected`, sums of `beta * score` over desirable and undesirable responses. Raises
    ValueError for a `beta` that is not positive or a negative weight.
    """
    _check(beta)
    if desirable_weight < 0 or undesirable_weight < 0:
        raise ValueError(
            f"desirable_weight: {desirable_weight} and undesirable_weight: {undesirable_weight} "
            "must be at least 0"
        )
    z = baseline.detach()
    # 1 - sigmoid(x) = sigmoid(-x), without the rounding of the difference.
    desirable = torch.sigmoid(-beta * (desirable_C - z)).sum()
    undesirable = torch.sigmoid(-beta * (z - undesirable_D)).sum()
    metrics = {
        "reward_chosen": beta * desirable_C.detach().sum(),
        "reward_rejected": beta * undesirable_D.detach().sum(),
    }
    return desirable_weight * desirable + undesirable_weight * undesirable, metrics


def kto_baseline(score_B: Tensor) -> Tensor:
    """KTO's `z`: max(0, mean score) of responses set after prompts that are not theirs.

    An estimate of KL(policy || reference), biased but never below 0 (arXiv 2402.01306, section
    4.1). It is a mean over the whole step, so it is computed before the step is split. Detached.
    """
    return score_B.detach().mean().clamp(min=0)


def chosen_nll(chosen_logp_P: Tensor, length_P: Tensor, *, weight: float) -> tuple[Tensor, Metrics]:
    """Sum over pairs of `-weight * log p(chosen) / tokens`: keeps the chosen response likely.

    `chosen_logp_P` are sums over all tokens of the chosen responses and `length_P` their numbers
    (at least 1). Source: Pang et al., arXiv 2404.19733, Eq. 1; Llama 3, arXiv 2407.21783, section
    4.1.4, with weight 0.2. Metrics: `nll`, nats per token, summed over pairs without the weight.
    """
    same_shape(chosen_logp_P=chosen_logp_P, length_P=length_P)
    nll_P = -chosen_logp_P / length_P
    return weight * nll_P.sum(), {"nll": nll_P.detach().sum()}


def pair_metrics(chosen_P: Tensor, rejected_P: Tensor, *, beta: float) -> Metrics:
    """Detached sums over pairs of what the scores say, with reward = `beta * score`.

    `accuracy` (pairs whose chosen response has the higher reward), `margin` (chosen minus rejected
    reward), `reward_chosen`, `reward_rejected`.
    """
    same_shape(chosen_P=chosen_P, rejected_P=rejected_P)
    chosen_P, rejected_P = beta * chosen_P.detach(), beta * rejected_P.detach()
    return {
        "accuracy": (chosen_P > rejected_P).to(chosen_P.dtype).sum(),
        "margin": (chosen_P - rejected_P).sum(),
        "reward_chosen": chosen_P.sum(),
        "reward_rejected": rejected_P.sum(),
    }


def _check(beta: float, **scores: Tensor) -> None:
    same_shape(**scores)
    if not beta > 0:
        raise ValueError(f"beta: {beta} must be above 0; DPO's is 0.1, length-normalised DPO's 5")
