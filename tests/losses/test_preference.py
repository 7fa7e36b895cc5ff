"""Preference losses: values by hand, gradients, and what must not change them.

Suffixes: N flat response tokens, B rows, P pairs.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.losses.ops import row_means, row_sums
from posttrain.losses.preference import (
    chosen_nll,
    dpo,
    ipo,
    kto,
    kto_baseline,
    pair_metrics,
    response_scores,
)

LOG2 = math.log(2)
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
PAIRED: list[tuple[Loss, dict[str, float]]] = [
    (dpo, {"beta": 0.7}),
    (dpo, {"beta": 0.7, "gamma": 0.4}),
    (dpo, {"beta": 0.7, "label_smoothing": 0.1}),
    (ipo, {"beta": 0.7}),
]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64)


def values(metrics: dict[str, Tensor]) -> dict[str, float]:
    assert not any(value.requires_grad for value in metrics.values())
    return {name: value.item() for name, value in metrics.items()}


def test_scores_by_hand():
    """Row 0 has log p = -1, -2 and row 1 -3, -4, -5, of which the last does not count: sums -3 and
    -7. With log q = -4 and -5 the log ratios are 1 and -2, per token 1/2 and -1."""
    logp_N = tensor(-1, -2, -3, -4, -5)
    counted_N = torch.tensor([True, True, True, True, False])
    row_N = torch.tensor([0, 0, 1, 1, 1])
    assert row_sums(logp_N, row_N, 2, counted_N).tolist() == [-3, -7]
    assert row_sums(logp_N, row_N, 3).tolist() == [-3, -12, 0]
    assert row_means(logp_N, row_N, 3, counted_N).tolist() == [-1.5, -3.5, 0]
    assert response_scores(logp_N, counted_N, row_N, num_rows=2).tolist() == [-3, -7]
    reference = {"ref_logp_B": tensor(-4, -5), "num_rows": 2}
    assert response_scores(logp_N, counted_N, row_N, **reference).tolist() == [1, -2]
    means = response_scores(logp_N, counted_N, row_N, mean=True, **reference)
    assert means.tolist() == [0.5, -1]


def test_masked_tokens_carry_neither_value_nor_gradient():
    logp_N = tensor(-1, math.nan, -2, -math.inf).requires_grad_()
    counted_N = torch.tensor([True, False, True, False])
    score_B = response_scores(logp_N, counted_N, torch.tensor([0, 0, 1, 2]), num_rows=3, mean=True)
    assert score_B.tolist() == [-1, -2, 0]
    (grad_N,) = torch.autograd.grad(score_B.sum(), logp_N)
    assert grad_N.tolist() == [1, 0, 1, 0]


def test_dpo_by_hand():
    """beta = 1/2 and scores 2 log 3 against 0: the margin is log 3 and sigmoid 3/4, so the loss is
    log(4/3). Smoothed by 1/4 it is 3/4 log(4/3) + 1/4 log 4. d loss / d chosen = -beta / 4."""
    chosen_P, rejected_P = tensor(2 * math.log(3)).requires_grad_(), tensor(0.0)
    loss, metrics = dpo(chosen_P, rejected_P, beta=0.5)
    assert loss.item() == pytest.approx(math.log(4 / 3))
    assert values(metrics) == pytest.approx(
        {
            "accuracy": 1,
            "margin": math.log(3),
            "reward_chosen": math.log(3),
            "reward_rejected": 0,
        }
    )
    (grad_P,) = torch.autograd.grad(loss, chosen_P)
    assert grad_P.item() == pytest.approx(-0.5 / 4)
    smoothed, _ = dpo(chosen_P, rejected_P, beta=0.5, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_simpo_by_hand():
    """beta = 2, mean log-probs -1/2 and -1, gamma = 1: the margin 2 (1/2) - 1 is 0, the loss log 2.
    The metrics are about rewards, -1 and -2, without gamma."""
    loss, metrics = dpo(tensor(-0.5), tensor(-1.0), beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(LOG2)
    assert values(metrics) == {
        "accuracy": 1,
        "margin": 1,
        "reward_chosen": -1,
        "reward_rejected": -2,
    }


def test_ipo_by_hand():
    """beta = 1/4 asks for a margin of 2. Scores 1 and -1 have it; 0 and 1 miss it by 3: 0 + 9."""
    loss, metrics = ipo(tensor(1, 0), tensor(-1, 1), beta=0.25)
    assert loss.item() == pytest.approx(9)
    assert values(metrics)["accuracy"] == 1
    assert values(metrics)["margin"] == pytest.approx(0.25 * (2 - 1))


def test_kto_by_hand():
    """beta = 1, z = log 2. Desirable with score log 6: 1 - sigmoid(log 3) = 1/4, weighed by 2.
    Undesirable with score 0: 1 - sigmoid(log 2) = 1/3, weighed by 3. Together 1/2 + 1."""
    loss, metrics = kto(
        tensor(math.log(6)),
        tensor(0.0),
        tensor(LOG2)[0],
        beta=1.0,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    assert loss.item() == pytest.approx(1.5)
    assert values(metrics) == pytest.approx({"reward_chosen": math.log(6), "reward_rejected": 0})


def test_the_kto_baseline_is_a_constant_of_at_least_zero():
    score_B = tensor(1, 3, -1).requires_grad_()
    assert kto_baseline(score_B).item() == 1
    assert not kto_baseline(score_B).requires_grad
    assert kto_baseline(-score_B).item() == 0
    loss, _ = kto(score_B, score_B, score_B.mean(), beta=1.0)
    same, _ = kto(score_B, score_B, kto_baseline(score_B), beta=1.0)
    grads = [torch.autograd.grad(value, score_B, retain_graph=True)[0] for value in (loss, same)]
    assert torch.equal(*grads), "no gradient flows through the baseline"


def test_nll_by_hand():
    """Log-probs -6 over 3 tokens and -1 over 2: 2 + 1/2 nats per token, weighed by 0.2."""
    logp_P = tensor(-6, -1).requires_grad_()
    loss, metrics = chosen_nll(logp_P, torch.tensor([3, 2]), weight=0.2)
    assert loss.item() == pytest.approx(0.5)
    assert values(metrics) == {"nll": 2.5}
    (grad_P,) = torch.autograd.grad(loss, logp_P)
    assert grad_P.tolist() == pytest.approx([-0.2 / 3, -0.2 / 2])


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_a_policy_that_is_its_reference(beta: float):
    """All scores 0: log 2 per pair for DPO, 1/2 per response for KTO, no margin, no accuracy; and
    IPO asks for its whole margin of 1 / (2 beta)."""
    zero_P = torch.zeros(3, dtype=torch.float64)
    for smoothing in (0.0, 0.2):
        loss, metrics = dpo(zero_P, zero_P, beta=beta, label_smoothing=smoothing)
        assert loss.item() == pytest.approx(3 * LOG2)
        assert set(values(metrics).values()) == {0}
    assert ipo(zero_P, zero_P, beta=beta)[0].item() == pytest.approx(3 / (2 * beta) ** 2)
    baseline = kto_baseline(torch.cat([zero_P, zero_P]))
    assert kto(zero_P, zero_P, baseline, beta=beta)[0].item() == pytest.approx(3)


@pytest.mark.parametrize(("loss", "settings"), PAIRED)
def test_swapping_chosen_and_rejected_turns_the_gradient_round(loss: Loss, settings: Any):
    """A tie has gradients of opposite sign; a swapped pair has the opposite margin."""
    chosen_P, rejected_P = random(5), random(5, seed=1)
    ours, theirs = (
        values(loss(*pair, **settings)[1])
        for pair in ((chosen_P, rejected_P), (rejected_P, chosen_P))
    )
    assert ours["margin"] == pytest.approx(-theirs["margin"])
    assert ours["accuracy"] == 5 - theirs["accuracy"]
    assert ours["reward_chosen"] == theirs["reward_rejected"]
    pair = [random(5).requires_grad_(), random(5, seed=1).requires_grad_()]
    grad_chosen_P, grad_rejected_P = torch.autograd.grad(loss(*pair, **settings)[0], pair)
    torch.testing.assert_close(grad_chosen_P, -grad_rejected_P)
    # One number by which the two orders of a pair must differ: log sigmoid(m) - log sigmoid(-m).
    if settings == {"beta": 0.7}:
        forward, back = (loss(*p, **settings)[0].item() for p in (pair, pair[::-1]))
        margin = 0.7 * (pair[0] - pair[1]).sum().item()
        factor = 1 if loss is dpo else 2 / 0.7 / 0.7
        assert back - forward == pytest.approx(margin * factor)


@pytest.mark.parametrize(("loss", "settings"), PAIRED)
def test_order_and_parts(loss: Loss, settings: Any):
    chosen_P, rejected_P = random(7), random(7, seed=1)
    total, metrics = loss(chosen_P, rejected_P, **settings)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    again, _ = loss(chosen_P[order], rejected_P[order], **settings)
    assert again.item() == pytest.approx(total.item(), rel=1e-14)
    parts = [loss(chosen_P[s], rejected_P[s], **settings) for s in (slice(0, 2), slice(2, 7))]
    assert sum(part[0].item() for part in parts) == pytest.approx(total.item(), rel=1e-14)
    for name, value in values(metrics).items():
        assert sum(values(part[1])[name] for part in parts) == pytest.approx(value, rel=1e-14)


def test_order_and_parts_of_kto():
    """Parts share the baseline of the whole step."""
    score_C, score_D = random(4), random(6, seed=1)
    baseline = kto_baseline(random(9, seed=2).abs())
    total, metrics = kto(score_C, score_D, baseline, beta=0.3)
    parts = [
        kto(score_C[:1], score_D[3:], baseline, beta=0.3),
        kto(score_C[1:].flip(0), score_D[:3], baseline, beta=0.3),
    ]
    assert sum(part[0].item() for part in parts) == pytest.approx(total.item(), rel=1e-14)
    for name, value in values(metrics).items():
        assert sum(values(part[1])[name] for part in parts) == pytest.approx(value, rel=1e-14)


def test_padding_and_the_order_of_rows_leave_scores_alone():
    logp_N, counted_N = random(9), torch.tensor([True] * 8 + [False])
    row_N = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3])
    score_B = response_scores(logp_N, counted_N, row_N, num_rows=4, mean=True)
    padded = response_scores(
        torch.cat([logp_N, tensor(math.nan, -1e9)]),
        torch.cat([counted_N, torch.tensor([False, False])]),
        torch.cat([row_N, torch.tensor([1, 3])]),
        num_rows=4,
        mean=True,
    )
    assert torch.equal(padded, score_B)
    turned = response_scores(
        logp_N.flip(0), counted_N.flip(0), 3 - row_N.flip(0), num_rows=4, mean=True
    )
    torch.testing.assert_close(turned.flip(0), score_B, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("loss", "settings"), PAIRED)
@pytest.mark.parametrize("mean", [False, True])
def test_gradcheck(loss: Loss, settings: Any, mean: bool):
    """From token log-probabilities to the loss."""
    row_N = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    counted_N = torch.tensor([True, True, True, False, True, True, True, True])
    ref_logp_B = random(4, seed=3)

    def whole(logp_N: Tensor) -> Tensor:
        score_B = response_scores(
            logp_N, counted_N, row_N, num_rows=4, ref_logp_B=ref_logp_B, mean=mean
        )
        return loss(score_B[::2], score_B[1::2], **settings)[0]

    assert torch.autograd.gradcheck(whole, random(8).requires_grad_())


def test_gradcheck_of_kto_and_nll():
    baseline = tensor(0.3)[0]
    arguments = (random(3).requires_grad_(), random(2, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda c, d: kto(c, d, baseline, beta=0.6, desirable_weight=1.3)[0], arguments
    )
    lengths = torch.tensor([2, 5, 1])
    assert torch.autograd.gradcheck(lambda c: chosen_nll(c, lengths, weight=0.2)[0], arguments[:1])


def test_far_apart_pairs_stay_finite():
    chosen_P, rejected_P = tensor(-1e4, 1e4).requires_grad_(), tensor(1e4, -1e4)
    loss, _ = dpo(chosen_P, rejected_P, beta=1.0, label_smoothing=0.1)
    (grad_P,) = torch.autograd.grad(loss, chosen_P)
    assert loss.item() == pytest.approx(0.9 * 2e4 + 0.1 * 2e4)
    assert grad_P.tolist() == pytest.approx([-0.9, 0.1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: dpo(a, b, beta=0.0), "beta: 0.0 must be above 0"),
        (lambda a, b: ipo(a, b, beta=-1.0), "beta: -1.0 must be above 0"),
        (lambda a, b: kto(a, b, a[0], beta=0.0), "beta: 0.0 must be above 0"),
        (lambda a, b: dpo(a, b, beta=1.0, label_smoothing=0.5), r"must be in \[0, 0.5\)"),
        (lambda a, b: dpo(a, b[:1], beta=1.0), r"chosen_P \(2,\), rejected_P \(1,\)"),
        (lambda a, b: pair_metrics(a[:1], b, beta=1.0), r"chosen_P \(1,\), rejected_P \(2,\)"),
        (lambda a, b: kto(a, b, a[0], beta=1.0, desirable_weight=-1.0), "must be at least 0"),
        (lambda a, b: chosen_nll(a, b[:1], weight=1.0), "must have the same shape"),
        (lambda a, b: row_sums(a, b, 2, b[:1] > 0), "must have the same shape"),
    ],
)
def test_bad_arguments_are_named(call: Callable[..., Any], message: str):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2), torch.zeros(2))
