"""CISPO, GMPO and Kimi's squared loss: hand-derived values, gradients, invariances."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.losses.policy import cispo, geometric_mean, policy_gradient, squared_log_ratio

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
LOSSES: dict[str, Loss] = {
    "cispo": partial(cispo, ratio="token", clip_low=0.3, clip_high=0.2),
    "cispo of rows": partial(cispo, ratio="sequence", clip_low=0.3, clip_high=0.2),
    "gmpo": partial(geometric_mean, clip_low=0.2, clip_high=0.2),
    "kimi": partial(squared_log_ratio, tau=0.4),
    "product": partial(policy_gradient, ratio="product", clip_low=0.5, clip_high=0.5),
    "dual": partial(policy_gradient, ratio="token", clip_low=0.1, clip_high=0.1, dual_clip=1.2),
}
every_loss = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)


def make_batch() -> dict[str, Tensor]:
    """Ten tokens of four rows (row 2 has none), ratios on both sides of the clips."""
    generator = torch.Generator().manual_seed(0)
    row_N = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3, 3])
    old_logp_N = -torch.rand(10, generator=generator, dtype=torch.float64) * 3
    logp_N = old_logp_N + torch.randn(10, generator=generator, dtype=torch.float64) * 0.4
    advantage_B = torch.tensor([1.3, -0.7, 0.0, 0.4], dtype=torch.float64)
    return {
        "logp_N": logp_N,
        "old_logp_N": old_logp_N,
        "advantage_N": advantage_B[row_N],
        "weight_N": torch.rand(10, generator=generator, dtype=torch.float64) + 0.1,
        "row_N": row_N,
        "correction_N": torch.rand(10, generator=generator, dtype=torch.float64),
    }


def logs(*ratios: float) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()


def call(loss_of: Any, logp_N: Tensor, advantage: list[float], weight: list[float], row: list[int]):
    """Loss, gradient and metrics against an old policy whose log-probs are all 0."""
    loss, metrics = loss_of(
        logp_N,
        torch.zeros_like(logp_N),
        torch.tensor(advantage, dtype=torch.float64),
        torch.tensor(weight, dtype=torch.float64),
        torch.tensor(row),
        num_rows=max(row) + 1,
    )
    (grad_N,) = torch.autograd.grad(loss, logp_N)
    return loss.item(), grad_N.tolist(), {name: value.item() for name, value in metrics.items()}


def test_cispo_by_hand():
    """Ratios 3, 1/2, 3, 1/2 with weights in [0.4, 2]: factors 2, 0.5, 2, 0.5 (one end only).

    Loss: -2 log 3 - 0.5 log 0.5 + 2 log 3 + 0.5 log 0.5 = 0 with A = 1, 1, -1, -1. The gradient is
    -factor * A at every token: -2, -0.5, 2, 0.5. With no lower room, [1, 2], 1/2 becomes 1.
    """
    options: dict[str, Any] = {"ratio": "token", "clip_high": 1.0}
    batch = ([1.0, 1.0, -1.0, -1.0], [1.0] * 4, [0] * 4)
    loss, grad, metrics = call(
        partial(cispo, **options, clip_low=0.6), logs(3, 0.5, 3, 0.5), *batch
    )
    assert loss == pytest.approx(0, abs=1e-12)
    assert grad == pytest.approx([-2.0, -0.5, 2.0, 0.5])
    assert (metrics["clip_low"], metrics["clip_high"]) == (0, 2)
    assert metrics["ratio"] == pytest.approx(7)
    loss, grad, metrics = call(partial(cispo, **options, clip_low=0), logs(3, 0.5), [1.0, 2.0],
                               [1.0, 1.0], [0, 0])  # fmt: skip
    assert loss == pytest.approx(-2 * math.log(3) + 2 * math.log(2))
    assert grad == pytest.approx([-2.0, -2.0])
    assert (metrics["clip_low"], metrics["clip_high"]) == (1, 1)
    approx_kl = 3 - 1 - math.log(3) + 0.5 - 1 + math.log(2)
    assert metrics["approx_kl"] == pytest.approx(approx_kl)


def test_cispo_of_rows_by_hand():
    """Ratios 4 and 1: geometric mean 2, cut to 1.5 for both tokens. Loss -1.5 * (log 4 + 0)."""
    of_rows = partial(cispo, ratio="sequence", clip_low=0.0, clip_high=0.5)
    loss, grad, metrics = call(of_rows, logs(4, 1), [1.0, 1.0], [1.0, 1.0], [0, 0])
    assert loss == pytest.approx(-1.5 * math.log(4))
    assert grad == pytest.approx([-1.5, -1.5])
    assert (metrics["clip_high"], metrics["ratio"]) == (2, pytest.approx(4))


def test_geometric_mean_by_hand():
    """Clip log 2 up, log 4 down.

    Row 0, A = 1: ratios 8 -> 2, 1/8 stays: g = sqrt(1/4) = 1/2; weights 1/2 each: loss -1/2. Only
    the second token has gradient: -A * g * 1/2 * (sum of weights 1) = -1/4.
    Row 1, A = -2: ratios 8 stays, 1/8 -> 1/4: g = sqrt 2, loss 2 sqrt 2, first token's gradient
    2 * sqrt 2 / 2.
    """
    gmpo = partial(geometric_mean, clip_low=math.log(4), clip_high=math.log(2))
    loss, grad, metrics = call(
        gmpo, logs(8, 1 / 8, 8, 1 / 8), [1.0, 1.0, -2.0, -2.0], [0.5] * 4, [0, 0, 1, 1]
    )
    assert loss == pytest.approx(-0.5 + 2 * 2**0.5)
    assert grad == pytest.approx([0.0, -0.25, 2**0.5, 0.0])
    assert (metrics["clip_low"], metrics["clip_high"]) == (1, 1)
    assert metrics["ratio"] == pytest.approx(2 * 0.5 + 2 * 2**0.5)


def test_squared_log_ratio_by_hand():
    """tau 1/2. Row 0: log ratios log 2 + log 4 = log 8, A = 1; row 1: log ratio 0, A = -3.

    Squares (1 - log(8) / 2)^2 and 9, over 2 tau = 1; weights 1/2, 1/2 and 1: loss is their sum.
    Gradients: -(1 - log(8) / 2) for both tokens of row 0, and +3.
    """
    kimi = partial(squared_log_ratio, tau=0.5)
    loss, grad, metrics = call(kimi, logs(2, 4, 1), [1.0, 1.0, -3.0], [0.5, 0.5, 1.0], [0, 0, 1])
    residual = 1 - math.log(8) / 2
    assert loss == pytest.approx(residual**2 + 9)
    assert grad == pytest.approx([-residual, -residual, 3.0])
    assert metrics["ratio"] == pytest.approx(2 * 8**0.5 + 1)
    assert metrics["residual"] == pytest.approx(2 * residual**2 + 9)


def test_the_optimum_of_the_squared_loss_is_the_tilted_policy():
    """Three responses of one token, all sampled: descent ends at pi ~ pi_old * exp(r / tau).

    There A - tau * log(pi / pi_old) is the same for all three only up to tau log Z less mean r,
    so the baseline that makes it vanish is tau log Z; with it the loss is 0.
    """
    old_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reward_V, tau = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), 0.7
    log_z = (old_V * (reward_V / tau).exp()).sum().log()
    optimum_V = old_V.log() + reward_V / tau - log_z
    loss, metrics = squared_log_ratio(
        optimum_V,
        old_V.log(),
        reward_V - tau * log_z,
        old_V,
        torch.arange(3),
        num_rows=3,
        tau=tau,
    )
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert metrics["approx_kl"].item() > 0.1


@every_loss
def test_on_policy_is_the_plain_policy_gradient(loss_of: Loss):
    """old == new, one weight for the tokens of a row: -w A at each.

    Where the row is one action (Kimi, product), its tokens' weights add up: times the length.
    """
    batch = make_batch() | {"correction_N": None}
    logp_N = batch.pop("logp_N").requires_grad_()
    batch["old_logp_N"] = logp_N.detach()
    weight_B = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
    batch["weight_N"] = weight_B[batch["row_N"]]
    loss, metrics = loss_of(logp_N, **batch, num_rows=4)
    (grad_N,) = torch.autograd.grad(loss, logp_N)
    plain_N = -batch["weight_N"] * batch["advantage_N"]
    if loss_of in (LOSSES["kimi"], LOSSES["product"]):
        plain_N = plain_N * torch.tensor([3, 4, 0, 3])[batch["row_N"]]
    torch.testing.assert_close(grad_N, plain_N)
    assert metrics["ratio"].item() == 10
    assert metrics["approx_kl"].item() == 0


@every_loss
def test_gradcheck(loss_of: Loss):
    """CISPO's factor is a constant, so its numeric derivative is taken at a fixed factor."""
    batch = make_batch()
    logp_N = batch.pop("logp_N").requires_grad_()
    if getattr(loss_of, "func", None) is cispo:
        factor_N = -torch.autograd.grad(loss_of(logp_N, **batch, num_rows=4)[0], logp_N)[0]
        loss, _ = loss_of(logp_N, **batch, num_rows=4)
        torch.testing.assert_close(loss, -(factor_N * logp_N).sum())
        ratio_N = (logp_N - batch["old_logp_N"]).exp().detach()
        scale_N = batch["weight_N"] * batch["correction_N"] * batch["advantage_N"]
        if loss_of.keywords["ratio"] == "token":
            torch.testing.assert_close(factor_N, ratio_N.clamp(0.7, 1.2) * scale_N)
        return
    assert torch.autograd.gradcheck(
        lambda logp_N: loss_of(logp_N, **batch, num_rows=4)[0], (logp_N,)
    )


@every_loss
def test_padding_order_and_parts(loss_of: Loss):
    """Garbage of weight 0, another order and two calls leave loss, gradient and metrics."""
    batch = make_batch()
    logp_N = batch["logp_N"].requires_grad_()
    loss, metrics = loss_of(**batch, num_rows=4)
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
    again, again_metrics = loss_of(**padded, num_rows=4)
    close = partial(torch.testing.assert_close, rtol=1e-13, atol=1e-13)
    close(again, loss)
    close(torch.autograd.grad(again, logp_N)[0], grad_N)

    first, first_metrics = loss_of(**{name: t[:7] for name, t in batch.items()}, num_rows=2)
    rest = {name: t[7:] for name, t in batch.items()} | {"row_N": batch["row_N"][7:] - 3}
    second, second_metrics = loss_of(**rest, num_rows=1)
    close(first + second, loss)
    for name, value in metrics.items():
        assert not value.requires_grad
        close(again_metrics[name], value)
        close(first_metrics[name] + second_metrics[name], value)


@every_loss
def test_a_correction_multiplies_and_masks(loss_of: Loss):
    """A factor for each row is a weight for each row; 0 is a row of advantage 0, without a loss."""
    batch = make_batch()
    factor_B = torch.tensor([0.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    batch["correction_N"] = factor_B[batch["row_N"]]
    loss, _ = loss_of(**batch, num_rows=4)
    counted_N = batch["row_N"] != 0
    kept = {name: tensor[counted_N] for name, tensor in batch.items()}
    kept["weight_N"] = kept["weight_N"] * kept.pop("correction_N")
    torch.testing.assert_close(loss, loss_of(**kept, num_rows=4)[0])


def test_errors():
    batch = make_batch()
    rows: dict[str, Any] = {"num_rows": 4}
    with pytest.raises(ValueError, match="ratio: 'row' is not one of token, sequence, product"):
        cispo(**batch, **rows, ratio="row", clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match=r"clip_low: 1\.5 must be in \[0, 1\]"):
        cispo(**batch, **rows, ratio="token", clip_low=1.5, clip_high=0.2)
    with pytest.raises(ValueError, match=r"clip_high: -0\.4 must be at least 0"):
        geometric_mean(**batch, **rows, clip_low=0.4, clip_high=-0.4)
    for tau in (0.0, math.nan):
        with pytest.raises(ValueError, match=f"tau: {tau} must be above 0"):
            squared_log_ratio(**batch, **rows, tau=tau)
    batch["weight_N"] = batch["weight_N"][:3]
    for loss_of in LOSSES.values():
        with pytest.raises(ValueError, match=r"logp_N \(10,\).*weight_N \(3,\)"):
            loss_of(**batch, **rows)
