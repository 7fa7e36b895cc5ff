"""Log ratios that exp would turn into inf: values and gradients stay finite, and are counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.losses.ops import (
    MAX_KL_GAP,
    MAX_LOG_RATIO,
    bounded,
    kl_estimate,
    kl_penalty,
    unbiased_kl_penalty,
)
from posttrain.losses.policy import (
    cispo,
    geometric_mean,
    policy_gradient,
    squared_log_ratio,
)

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}
SURROGATES: dict[str, Callable[..., Any]] = {
    f"{name}, {ratio}": partial(surrogate, ratio=ratio, **CLIP)
    for name, surrogate in (("clip", policy_gradient), ("cispo", cispo))
    for ratio in ("token", "sequence", "product")
} | {
    "dual clip": partial(policy_gradient, ratio="token", dual_clip=3.0, **CLIP),
    "gmpo": partial(geometric_mean, **CLIP),
    "kimi": partial(squared_log_ratio, tau=0.5),
}
# k3 of a token whose reference is 10 nats likelier or more: exp(10) - 1 - 10.
LARGEST_K3 = math.exp(10) - 11


def test_the_bounds() -> None:
    assert (MAX_LOG_RATIO, MAX_KL_GAP) == (20, 10)
    log_ratio_N = torch.tensor([-200.0, 19.5, 20.0, 94.0, math.inf], requires_grad=True)
    bounded_N = bounded(log_ratio_N)
    assert bounded_N.tolist() == [-200.0, 19.5, 20.0, 20.0, 20.0]
    bounded_N.sum().backward()
    assert log_ratio_N.grad is not None
    assert log_ratio_N.grad.tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("gap", [30.0, 94.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES)
def test_surrogates_stay_finite(
    surrogate: Callable[..., Any], advantage: float, gap: float
) -> None:
    """Rows of 2 and 1 tokens, the first with a token that has become `gap` nats likelier. The row
    beside it learns as if it were alone."""
    row_N = torch.tensor([0, 0, 1])
    advantage_N = torch.tensor([advantage, advantage, 1.0])
    grads = []
    for distance in (gap, 0.0):
        logp_N = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
        old_logp_N = torch.tensor([-1.0 - distance, -2.0, -3.0])
        loss, metrics = surrogate(logp_N, old_logp_N, advantage_N, torch.ones(3), row_N, num_rows=2)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(value) for value in metrics.values())
        assert logp_N.grad is not None
        assert torch.isfinite(logp_N.grad).all()
        grads.append(logp_N.grad)
        assert (metrics["ratio_bounded"] == 0) or distance == gap
    assert grads[0][2] == grads[1][2]


def test_tokens_beyond_are_counted() -> None:
    """30 nats in one token of two: beyond 20 as a token and as a sum, but not as a mean of 15."""
    logp_N, old_logp_N = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-31.0, -2.0, -3.0])
    counts = []
    for ratio in ("token", "sequence", "product"):
        _, metrics = policy_gradient(
            logp_N,
            old_logp_N,
            torch.ones(3),
            torch.ones(3),
            torch.tensor([0, 0, 1]),
            num_rows=2,
            ratio=ratio,
            **CLIP,
        )
        counts.append(metrics["ratio_bounded"].item())
    assert counts == [1, 0, 2]


def test_a_clipped_ratio_by_hand() -> None:
    """A = 1 and r = exp(94): min(r A, 1.2) = 1.2, a constant. Unbounded it was inf - inf."""
    logp_N = torch.tensor([-1.0], requires_grad=True)
    loss, _ = policy_gradient(
        logp_N,
        torch.tensor([-95.0]),
        torch.ones(1),
        torch.ones(1),
        torch.zeros(1, dtype=torch.int64),
        num_rows=1,
        ratio="token",
        **CLIP,
    )
    loss.backward()
    assert loss.item() == pytest.approx(-1.2)
    assert logp_N.grad is not None
    assert logp_N.grad.tolist() == [0.0]


@pytest.mark.parametrize(
    ("gap", "value", "gradient"),
    [
        # logp - ref_logp = -gap: exp(gap) - 1 - gap, gradient 1 - exp(gap).
        (2.0, math.exp(2) - 3, 1 - math.exp(2)),
        (10.0, LARGEST_K3, 1 - math.exp(10)),
        (10.5, LARGEST_K3, 0.0),
        (30.0, LARGEST_K3, 0.0),
        (94.0, LARGEST_K3, 0.0),
        # The other side is linear and needs no bound.
        (-30.0, 29 + math.exp(-30), 1.0),
        (-94.0, 93.0, 1.0),
    ],
)
def test_k3_by_hand(gap: float, value: float, gradient: float) -> None:
    logp_N = torch.tensor([-100.0 - gap, -2.0], requires_grad=True)
    ref_logp_N, beyond = torch.tensor([-100.0, -2.0]), int(gap > 10)
    loss, metrics = kl_penalty(logp_N, ref_logp_N, torch.ones(2), estimator="k3")
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert metrics["kl"].item() == pytest.approx(value, rel=1e-5)
    assert metrics["kl_bounded"] == beyond
    assert logp_N.grad is not None
    assert logp_N.grad.tolist() == pytest.approx([gradient, 0.0], rel=1e-5)
    # As a part of the reward it is the same number.
    reward_N = kl_estimate(logp_N.detach(), ref_logp_N, estimator="k3")
    assert reward_N.tolist() == pytest.approx([value, 0.0], rel=1e-5)


def test_the_unbiased_penalty_is_bounded_in_both_factors() -> None:
    """exp(20) (e^10 - 11) at most; beyond either bound that factor is a constant."""
    for old, ref in ((-100.0, -6.0), (-6.0, 88.0), (-100.0, 88.0)):
        logp_N = torch.tensor([-6.0], requires_grad=True)
        loss, metrics = unbiased_kl_penalty(
            logp_N, torch.tensor([old]), torch.tensor([ref]), torch.ones(1)
        )
        loss.backward()
        assert logp_N.grad is not None
        ratio = math.exp(20) if old == -100 else 1.0
        value = LARGEST_K3 if ref == 88 else 0.0
        assert loss.item() == pytest.approx(ratio * value, rel=1e-5)
        # d (r k3) = k3 dr + r dk3: the ratio has a gradient where it is not bounded.
        assert logp_N.grad.item() == pytest.approx(value if old == -6 else 0.0, rel=1e-5)
        assert metrics["kl_bounded"] == (ref == 88)


def test_within_the_bounds_no_bit_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    logp_N = -torch.rand(1000, generator=generator) * 9
    other_N = -torch.rand(1000, generator=generator) * 9

    def plain(logp_N: Tensor) -> Tensor:
        difference_N = logp_N - other_N
        return torch.expm1(-difference_N) + difference_N

    grads = []
    for estimate in (plain, lambda x_N: kl_estimate(x_N, other_N, estimator="k3")):
        leaf_N = logp_N.clone().requires_grad_()
        value_N = estimate(leaf_N)
        value_N.sum().backward()
        grads.append((value_N.detach(), leaf_N.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])
    assert torch.equal(bounded(2 * (logp_N - other_N)).exp(), (2 * (logp_N - other_N)).exp())


def test_dropped_tokens_are_not_counted() -> None:
    weight_N = torch.tensor([0.0, 1.0])
    _, metrics = kl_penalty(
        torch.tensor([-50.0, -1.0]), torch.tensor([0.0, -1.0]), weight_N, estimator="k3"
    )
    assert metrics["kl_bounded"] == 0
    _, metrics = kl_penalty(
        torch.tensor([-50.0, -1.0]), torch.tensor([0.0, -1.0]), torch.ones(2), estimator="k2"
    )
    assert metrics["kl_bounded"] == 0
