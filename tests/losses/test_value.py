"""The critic's loss and its explained variance: hand-derived values, gradients, invariances."""

import math

import pytest
import torch
from torch import Tensor

from posttrain.losses.value import clipped_value, explained_variance


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    old_value_N = torch.randn(9, generator=generator, dtype=torch.float64)
    return {
        "value_N": old_value_N + 0.4 * torch.randn(9, generator=generator, dtype=torch.float64),
        "old_value_N": old_value_N,
        "return_N": torch.randn(9, generator=generator, dtype=torch.float64),
        "weight_N": torch.rand(9, generator=generator, dtype=torch.float64) + 0.1,
    }


def test_by_hand():
    """Old value 0, return 1, clip 0.2, weight 2: value -> loss, gradient.

    0.1: within the clip, 0.9^2 = .81, gradient 2 * (0.1 - 1) = -1.8
    0.5: moved too far towards the return; V_clip = 0.2 has the larger error, .64, gradient 0
    -0.5: moved away from it; 1.5^2 = 2.25 is above V_clip's 1.2^2, gradient 2 * -1.5 = -3
    The weight 2 cancels the half.
    """
    value_N = torch.tensor([0.1, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    zeros_N, ones_N = torch.zeros_like(value_N), torch.ones_like(value_N)
    loss, metrics = clipped_value(value_N, zeros_N, ones_N, 2 * ones_N, clip=0.2)
    assert loss.item() == pytest.approx(0.81 + 0.64 + 2.25)
    loss.backward()
    assert value_N.grad is not None
    assert value_N.grad.tolist() == pytest.approx([-1.8, 0.0, -3.0])
    expected = {
        "value_clipped": 1.0,
        "value": 0.1,
        "value_tokens": 3.0,
        "return": 3.0,
        "return_square": 3.0,
        "value_error": 0.9 + 0.5 + 1.5,
        "value_error_square": 0.81 + 0.25 + 2.25,
    }
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(expected)
    plain, plain_metrics = clipped_value(value_N, zeros_N, ones_N, 2 * ones_N)
    assert plain.item() == pytest.approx(0.81 + 0.25 + 2.25)
    assert plain_metrics["value_clipped"].item() == 0


def test_values_that_have_not_moved_are_not_clipped():
    """V == V_old: plain squared errors with their whole gradient, however small the clip."""
    batch = make_batch()
    value_N = batch["old_value_N"].clone().requires_grad_()
    options = (batch["old_value_N"], batch["return_N"], batch["weight_N"])
    loss, metrics = clipped_value(value_N, *options, clip=1e-6)
    (grad_N,) = torch.autograd.grad(loss, value_N)
    torch.testing.assert_close(grad_N, batch["weight_N"] * (value_N - batch["return_N"]))
    assert metrics["value_clipped"].item() == 0


@pytest.mark.parametrize("clip", [None, 0.2])
def test_gradcheck(clip: float | None):
    batch = make_batch()
    value_N = batch.pop("value_N").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda value_N: clipped_value(value_N, **batch, clip=clip)[0], (value_N,)
    )
    assert (clipped_value(value_N, **batch, clip=clip)[1]["value_clipped"] > 0) == (clip == 0.2)


def test_padding_order_and_parts():
    batch = make_batch()
    value_N = batch["value_N"].requires_grad_()
    loss, metrics = clipped_value(**batch, clip=0.2)
    (grad_N,) = torch.autograd.grad(loss, value_N)
    bad = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    padded = {name: torch.cat([tensor, bad])[order] for name, tensor in batch.items()}
    padded["weight_N"] = torch.cat([batch["weight_N"], torch.zeros(2)])[order]
    again, again_metrics = clipped_value(**padded, clip=0.2)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(torch.autograd.grad(again, value_N)[0], grad_N)
    parts = [
        clipped_value(**{name: tensor[part] for name, tensor in batch.items()}, clip=0.2)
        for part in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss)
    for name, value in metrics.items():
        torch.testing.assert_close(again_metrics[name], value)
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)


def test_explained_variance_by_hand():
    """Returns 0, 2, 4: variance 8/3. Errors 0, 1, -1: variance 2/3, so 1 - 1/4. Off by 3: 1."""
    return_N = torch.tensor([0.0, 2.0, 4.0])

    def explained(value_N: Tensor, return_N: Tensor = return_N) -> float:
        ones_N = torch.ones_like(value_N)
        return explained_variance(clipped_value(value_N, value_N, return_N, ones_N)[1])

    assert explained(torch.tensor([0.0, 1.0, 5.0])) == pytest.approx(0.75)
    assert explained(return_N + 3) == pytest.approx(1)
    assert explained(torch.full((3,), 7.0)) == pytest.approx(0, abs=1e-6)
    assert explained(torch.tensor([4.0, 2.0, 0.0])) == pytest.approx(-3)
    assert explained(torch.tensor([0.0, 1.0, 5.0]), torch.full((3,), 0.1)) == 0
    assert explained(torch.zeros(0), torch.zeros(0)) == 0


def test_errors():
    batch = make_batch()
    for clip in (0.0, -0.2):
        with pytest.raises(ValueError, match=f"clip: {clip} must be above 0"):
            clipped_value(**batch, clip=clip)
    batch["return_N"] = batch["return_N"][:2]
    with pytest.raises(ValueError, match=r"return_N \(2,\)"):
        clipped_value(**batch)
