"""The clipped policy gradient and the KL penalty: hand-derived values, gradients, invariances."""

import math

import pytest
import torch
from torch import Tensor

from posttrain.losses.ops import kl_penalty, unbiased_kl_penalty
from posttrain.losses.policy import policy_gradient

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def make_batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Ten tokens of four rows (row 2 has none), ratios on both sides of the clip."""
    generator = torch.Generator().manual_seed(0)
    row_N = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3, 3])
    old_logp_N = -torch.rand(10, generator=generator, dtype=dtype) * 3
    logp_N = old_logp_N + torch.randn(10, generator=generator, dtype=dtype) * 0.4
    advantage_B = torch.tensor([1.3, -0.7, 0.0, 0.4], dtype=dtype)
    return {
        "logp_N": logp_N,
        "old_logp_N": old_logp_N,
        "advantage_N": advantage_B[row_N],
        "weight_N": torch.rand(10, generator=generator, dtype=dtype) + 0.1,
        "row_N": row_N,
        "correction_N": torch.rand(10, generator=generator, dtype=dtype),
    }


def take(batch: dict[str, Tensor], index: Tensor | slice) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in batch.items()}


def test_token_ratio_by_hand():
    """Clip 0.2, weight 2. Ratio, advantage -> -min(rA, clip(r)A), gradient with respect to logp:

    1.5, +1 -> -1.2, clipped: 0      0.5, +1 -> -0.5, gradient -0.5
    1.5, -1 -> +1.5, gradient +1.5   0.5, -1 -> +0.8, clipped: 0
    """
    logp_N = torch.tensor([1.5, 0.5, 1.5, 0.5], dtype=torch.float64).log().requires_grad_()
    loss, metrics = policy_gradient(
        logp_N,
        torch.zeros(4, dtype=torch.float64),
        torch.tensor([1.0, 1.0, -1.0, -1.0]),
        torch.full((4,), 2.0),
        torch.zeros(4, dtype=torch.int64),
        num_rows=1,
        ratio="token",
        **CLIP,
    )
    assert loss.item() == pytest.approx(2 * (-1.2 - 0.5 + 1.5 + 0.8))
    loss.backward()
    assert logp_N.grad is not None
    assert logp_N.grad.tolist() == pytest.approx([0.0, -1.0, 3.0, 0.0])
    values = {name: metric.item() for name, metric in metrics.items()}
    approx_kl = 2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5))
    expected = {"clip_low": 1.0, "clip_high": 1.0, "ratio": 4.0, "approx_kl": approx_kl}
    expected["ratio_bounded"] = 0.0
    assert values == pytest.approx(expected)


def test_asymmetric_clip():
    """clip_high 0.1 cuts ratio 1.5 to 1.1; clip_low 0.6 leaves 0.5 alone."""
    logp_N = torch.tensor([1.5, 0.5], dtype=torch.float64).log()
    loss, metrics = policy_gradient(
        logp_N,
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([1.0, -1.0]),
        torch.ones(2),
        torch.tensor([0, 1]),
        num_rows=2,
        ratio="token",
        clip_low=0.6,
        clip_high=0.1,
    )
    assert loss.item() == pytest.approx(-1.1 + 0.5)
    assert (metrics["clip_low"].item(), metrics["clip_high"].item()) == (0, 1)


def test_sequence_ratio_by_hand():
    """Row 0 has ratios 2, 1/2: geometric mean 1. Row 1 has 1.21, 1: 1.1. Row 2 has 4: clipped.

    A = 1, weights 1/2, 1/2 and 1: loss = -(1 + 1.1 + 1.2). With respect to each logp of row 1 the
    mean of logs has derivative 1/2, so the gradient is -1/2 * 1.1 (both tokens' weights summed to
    1).
    """
    logp_N = torch.tensor([2, 0.5, 1.21, 1.0, 4.0], dtype=torch.float64).log().requires_grad_()
    loss, metrics = policy_gradient(
        logp_N,
        torch.zeros(5, dtype=torch.float64),
        torch.ones(5),
        torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0]),
        torch.tensor([0, 0, 1, 1, 2]),
        num_rows=3,
        ratio="sequence",
        **CLIP,
    )
    assert loss.item() == pytest.approx(-(1 + 1.1 + 1.2))
    loss.backward()
    assert logp_N.grad is not None
    assert logp_N.grad.tolist() == pytest.approx([-0.5, -0.5, -0.55, -0.55, 0.0])
    assert metrics["clip_high"].item() == 1
    assert metrics["ratio"].item() == pytest.approx(1 + 1 + 1.1 + 1.1 + 4)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_on_policy_is_the_plain_policy_gradient(ratio: str):
    """old == new: all ratios are 1, so the loss is -sum A and its gradient -A at each logp."""
    batch = make_batch()
    logp_N = batch["logp_N"].requires_grad_()
    weight_N, advantage_N = torch.ones_like(batch["weight_N"]), batch["advantage_N"]
    loss, metrics = policy_gradient(
        logp_N,
        logp_N.detach(),
        advantage_N,
        weight_N,
        batch["row_N"],
        num_rows=4,
        ratio=ratio,
        **CLIP,
    )
    loss.backward()
    torch.testing.assert_close(loss, -advantage_N.sum())
    torch.testing.assert_close(logp_N.grad, -advantage_N)
    assert metrics["ratio"].item() == pytest.approx(10)
    assert metrics["approx_kl"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_gradcheck(ratio: str):
    batch = make_batch()
    logp_N = batch.pop("logp_N").requires_grad_()

    def loss(logp_N: Tensor) -> Tensor:
        return policy_gradient(logp_N, **batch, num_rows=4, ratio=ratio, **CLIP)[0]

    assert torch.autograd.gradcheck(loss, (logp_N,))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_padding_order_and_parts(ratio: str):
    """Garbage of weight 0, another order and two calls leave loss, gradient and metrics."""
    batch = make_batch()
    options = {"ratio": ratio, **CLIP}
    logp_N = batch["logp_N"].requires_grad_()
    loss, metrics = policy_gradient(**batch, num_rows=4, **options)
    (grad_N,) = torch.autograd.grad(loss, logp_N)

    garbage = {
        "logp_N": torch.tensor([-50.0, -math.inf, math.nan], dtype=torch.float64),
        "old_logp_N": torch.tensor([0.0, -1.0, -1.0], dtype=torch.float64),
        "advantage_N": torch.tensor([9.0, math.nan, 1.0], dtype=torch.float64),
        "weight_N": torch.zeros(3, dtype=torch.float64),
        "row_N": torch.tensor([0, 1, 2]),
        "correction_N": torch.tensor([5.0, 1.0, math.nan], dtype=torch.float64),
    }
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    padded = {name: torch.cat([batch[name], garbage[name]])[order] for name in batch}
    again, again_metrics = policy_gradient(**padded, num_rows=4, **options)
    torch.testing.assert_close(again, loss, rtol=1e-13, atol=1e-13)
    (again_grad_N,) = torch.autograd.grad(again, logp_N)
    torch.testing.assert_close(again_grad_N, grad_N, rtol=1e-13, atol=1e-13)

    first, first_metrics = policy_gradient(**take(batch, slice(0, 7)), num_rows=2, **options)
    rest = take(batch, slice(7, 10))
    rest["row_N"] = rest["row_N"] - 3
    second, second_metrics = policy_gradient(**rest, num_rows=1, **options)
    torch.testing.assert_close(first + second, loss, rtol=1e-13, atol=1e-13)
    for name, value in metrics.items():
        torch.testing.assert_close(again_metrics[name], value, rtol=1e-13, atol=1e-13)
        total = first_metrics[name] + second_metrics[name]
        torch.testing.assert_close(total, value, rtol=1e-13, atol=1e-13)


def test_correction_multiplies_and_masks():
    batch = make_batch()
    logp_N = batch.pop("logp_N").requires_grad_()
    batch["correction_N"] = torch.tensor([0.0, 2.0, *[1.0] * 8], dtype=torch.float64)
    loss, _ = policy_gradient(logp_N, **batch, num_rows=4, ratio="token", **CLIP)
    (grad_N,) = torch.autograd.grad(loss, logp_N)
    batch["correction_N"] = torch.ones(10, dtype=torch.float64)
    plain, _ = policy_gradient(logp_N, **batch, num_rows=4, ratio="token", **CLIP)
    (plain_N,) = torch.autograd.grad(plain, logp_N)
    assert plain_N[0] != 0 and plain_N[1] != 0
    factor_N = torch.tensor([0.0, 2.0, *[1.0] * 8], dtype=torch.float64)
    torch.testing.assert_close(grad_N, plain_N * factor_N)


def test_constants_get_no_gradient():
    batch = make_batch()
    constants = ("old_logp_N", "advantage_N", "correction_N")
    for name in ("logp_N", *constants):
        batch[name].requires_grad_()
    policy_gradient(**batch, num_rows=4, ratio="sequence", **CLIP)[0].backward()
    assert batch["logp_N"].grad is not None
    assert all(batch[name].grad is None for name in constants)


def test_policy_gradient_errors():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"'row' is not one of token, sequence"):
        policy_gradient(**batch, num_rows=4, ratio="row", **CLIP)
    with pytest.raises(ValueError, match=r"clip_low: -0\.1"):
        policy_gradient(**batch, num_rows=4, ratio="token", clip_low=-0.1, clip_high=0.2)
    batch["old_logp_N"] = batch["old_logp_N"][:9]
    with pytest.raises(ValueError, match=r"old_logp_N \(9,\)"):
        policy_gradient(**batch, num_rows=4, ratio="token", **CLIP)


def test_kl_penalty_by_hand():
    """p = 1/2, reference 1/4, weight 3, d = log 2. k2 = d^2/2, slope d; k3 = d - 1/2, slope 1/2."""
    d = math.log(2)
    for estimator, value, slope in (("k2", d * d / 2, d), ("k3", d - 0.5, 0.5)):
        logp_N = torch.tensor([0.5], dtype=torch.float64).log().requires_grad_()
        ref_logp_N = torch.tensor([0.25], dtype=torch.float64).log().requires_grad_()
        loss, metrics = kl_penalty(logp_N, ref_logp_N, torch.tensor([3.0]), estimator=estimator)
        loss.backward()
        assert loss.item() == pytest.approx(3 * value)
        assert metrics["kl"].item() == pytest.approx(value)
        assert logp_N.grad is not None and logp_N.grad.item() == pytest.approx(3 * slope)
        assert ref_logp_N.grad is None


def test_kl_penalty_refuses_k1():
    zeros = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"zero expected gradient.*in the reward.*k2, k3 as a loss"
    ):
        kl_penalty(zeros, zeros, zeros, estimator="k1")
    with pytest.raises(ValueError, match=r"'k5' is not one of"):
        kl_penalty(zeros, zeros, zeros, estimator="k5")


def test_product_ratio_by_hand():
    """Ratios 3 and 1/2: product 3/2, weights 1/2 each: loss -3/2 for A = 1, and so both gradients.

    The clip at 1.2 stops both tokens: loss -1.2.
    """
    logp_N = torch.tensor([3, 0.5], dtype=torch.float64).log().requires_grad_()
    rest = (torch.zeros(2), torch.ones(2), torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64))
    product = {"num_rows": 1, "ratio": "product", "clip_low": 0.2}
    loss, metrics = policy_gradient(logp_N, *rest, **product, clip_high=1.0)
    assert loss.item() == pytest.approx(-1.5)
    assert torch.autograd.grad(loss, logp_N)[0].tolist() == pytest.approx([-1.5, -1.5])
    assert metrics["ratio"].item() == pytest.approx(3)
    loss, metrics = policy_gradient(logp_N, *rest, **product, clip_high=0.2)
    assert loss.item() == pytest.approx(-1.2)
    assert torch.autograd.grad(loss, logp_N)[0].tolist() == [0, 0]
    assert metrics["clip_high"].item() == 2


def test_dual_clip_by_hand():
    """A = -1, clip 0.2, bound 3. Ratios 5, 2, 1/2: losses 5 -> 3 (stopped), 2, 0.8 (lower clip).

    A = 1 and ratio 5 stay with the upper clip, -1.2.
    """
    logp_N = torch.tensor([5, 2, 0.5, 5], dtype=torch.float64).log().requires_grad_()
    advantage_N = torch.tensor([-1.0, -1.0, -1.0, 1.0])
    rest = (torch.zeros(4), advantage_N, torch.ones(4), torch.zeros(4, dtype=torch.int64))
    options = {"num_rows": 1, "ratio": "token", **CLIP}
    loss, metrics = policy_gradient(logp_N, *rest, **options, dual_clip=3.0)
    assert loss.item() == pytest.approx(3 + 2 + 0.8 - 1.2)
    assert torch.autograd.grad(loss, logp_N)[0].tolist() == pytest.approx([0.0, 2.0, 0.0, 0.0])
    assert metrics["clip_dual"].item() == 1
    plain, plain_metrics = policy_gradient(logp_N, *rest, **options)
    assert plain.item() == pytest.approx(5 + 2 + 0.8 - 1.2)
    assert set(metrics) - set(plain_metrics) == {"clip_dual"}
    with pytest.raises(ValueError, match=r"dual_clip: 1\.0 must be above 1"):
        policy_gradient(logp_N, *rest, **options, dual_clip=1.0)


def test_unbiased_kl_penalty_by_hand():
    """p = 1/2, old 1/8, reference 1/4, weight 3. Ratio 4, d = log 2, k3 = d - 1/2.

    Value 4 (d - 1/2), slope 4 (d - 1/2) + 4 * 1/2 = 4 d. A NaN of weight 0 stays out.
    """
    d = math.log(2)
    logp_N = torch.tensor([0.5, math.nan], dtype=torch.float64).log().requires_grad_()
    old_logp_N = torch.tensor([0.125, math.nan], dtype=torch.float64).log().requires_grad_()
    ref_logp_N = torch.tensor([0.25, math.nan], dtype=torch.float64).log().requires_grad_()
    weight_N = torch.tensor([3.0, 0.0])
    loss, metrics = unbiased_kl_penalty(logp_N, old_logp_N, ref_logp_N, weight_N)
    loss.backward()
    assert loss.item() == pytest.approx(12 * (d - 0.5))
    assert metrics["kl"].item() == pytest.approx(4 * (d - 0.5))
    assert logp_N.grad is not None and logp_N.grad[0].item() == pytest.approx(12 * d)
    assert old_logp_N.grad is None and ref_logp_N.grad is None
    with pytest.raises(ValueError, match=r"ref_logp_N \(1,\)"):
        unbiased_kl_penalty(logp_N, old_logp_N, ref_logp_N[:1], weight_N)
