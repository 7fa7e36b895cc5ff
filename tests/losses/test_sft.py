"""Cross-entropy: value, gradient and invariances."""

import math

import pytest
import torch

from posttrain.losses.ops import cross_entropy


def test_by_hand():
    """p = 1/2 with weight 1 and p = 1/4 with weight 3: log 2 + 3 log 4 = 7 log 2; nll = 3 log 2."""
    logp_N = torch.tensor([0.5, 0.25], dtype=torch.float64).log().requires_grad_()
    loss, metrics = cross_entropy(logp_N, torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx(7 * math.log(2))
    assert metrics["nll"].item() == pytest.approx(3 * math.log(2))
    assert not metrics["nll"].requires_grad
    loss.backward()
    assert logp_N.grad is not None and logp_N.grad.tolist() == [-1.0, -3.0]


def test_padding_order_and_parts():
    generator = torch.Generator().manual_seed(0)
    logp_N = -torch.rand(10, generator=generator, dtype=torch.float64)
    weight_N = torch.rand(10, generator=generator, dtype=torch.float64)
    loss, metrics = cross_entropy(logp_N, weight_N)
    order = torch.randperm(10, generator=generator)
    padded = torch.cat([logp_N[order], torch.tensor([-1e9, -math.inf, math.nan])])
    again, again_metrics = cross_entropy(padded, torch.cat([weight_N[order], torch.zeros(3)]))
    assert again.item() == pytest.approx(loss.item(), rel=1e-14)
    assert again_metrics["nll"].item() == pytest.approx(metrics["nll"].item(), rel=1e-14)
    parts = [cross_entropy(logp_N[s], weight_N[s]) for s in (slice(0, 3), slice(3, 10))]
    assert sum(part[0].item() for part in parts) == pytest.approx(loss.item(), rel=1e-14)
    assert sum(part[1]["nll"].item() for part in parts) == pytest.approx(metrics["nll"].item())


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"logp_N \(2,\), weight_N \(3,\)"):
        cross_entropy(torch.zeros(2), torch.zeros(3))
