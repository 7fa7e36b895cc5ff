"""Importance corrections: hand-derived values, limits, non-finite sampler log-probabilities."""

import math

import pytest
import torch

from posttrain.rl.corrections import importance_correction, off_policy_mask

SAMPLER_N = torch.tensor([-1.0, -2.0, -3.0, -0.5], dtype=torch.float64)
RATIO_N = torch.tensor([1.0, 0.4, 8.0, 2.0], dtype=torch.float64)
TRAIN_N = SAMPLER_N + RATIO_N.log()


@pytest.mark.parametrize(
    ("mode", "factors", "masked", "truncated"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0], 0, 0),
        ("truncated", [1.0, 0.4, 2.5, 2.0], 0, 1),
        ("icepop", [1.0, 0.0, 0.0, 2.0], 2, 0),
    ],
)
def test_by_hand(mode: str, factors: list[float], masked: int, truncated: int):
    """Ratios 1, 0.4, 8 and 2 within [0.5, 2.5]."""
    correction_N, metrics = importance_correction(TRAIN_N, SAMPLER_N, mode=mode, low=0.5, high=2.5)
    assert correction_N.tolist() == pytest.approx(factors)
    values = {name: metric.item() for name, metric in metrics.items()}
    expected = {
        "correction_masked": masked,
        "correction_truncated": truncated,
        "sampler_ratio": 11.4,
        # Sum of r - 1 - log r.
        "sampler_kl": 11.4 - 4 - math.log(0.4 * 8 * 2),
        "sampler_ratio_bounded": 0,
        "correction": sum(factors),
        "correction_square": sum(factor**2 for factor in factors),
    }
    assert values == pytest.approx(expected)


def test_icepop_keeps_its_limits():
    """Ratios 1/2 and 2 with limits exactly there: both ends belong to the interval."""
    train_N = torch.tensor([0.5, 2.0], dtype=torch.float64).log()
    low, high = (train_N.exp()).tolist()
    correction_N, _ = importance_correction(
        train_N, torch.zeros(2, dtype=torch.float64), mode="icepop", low=low, high=high
    )
    assert correction_N.tolist() == [low, high]


@pytest.mark.parametrize("mode", ["none", "truncated", "icepop"])
def test_on_policy_is_one(mode: str):
    correction_N, metrics = importance_correction(
        SAMPLER_N, SAMPLER_N, mode=mode, low=0.5, high=2.0
    )
    assert correction_N.tolist() == [1.0] * 4
    effective = metrics["correction"] ** 2 / (metrics["correction_square"] * 4)
    assert effective.item() == 1


@pytest.mark.parametrize("mode", ["truncated", "icepop"])
def test_non_finite_sampler_is_masked(mode: str):
    sampler_N = torch.tensor([-math.inf, math.nan, -1.0])
    correction_N, metrics = importance_correction(
        torch.full((3,), -1.0), sampler_N, mode=mode, low=0.5, high=2.0
    )
    assert correction_N.tolist() == [0.0, 0.0, 1.0]
    assert metrics["correction_masked"].item() == 2
    assert metrics["sampler_ratio"].item() == 1


def test_detached():
    train_N = TRAIN_N.clone().requires_grad_()
    correction_N, metrics = importance_correction(
        train_N, SAMPLER_N, mode="truncated", low=0.0, high=2.0
    )
    assert not correction_N.requires_grad
    assert not any(metric.requires_grad for metric in metrics.values())


def test_errors():
    limits = {"low": 0.5, "high": 2.0}
    with pytest.raises(ValueError, match="'tis' is not one of none, truncated, icepop"):
        importance_correction(TRAIN_N, SAMPLER_N, mode="tis", **limits)
    with pytest.raises(ValueError, match=r"train_logp_N \(4,\), sampler_logp_N \(3,\)"):
        importance_correction(TRAIN_N, SAMPLER_N[:3], mode="none", **limits)
    for low, high in ((-0.1, 2.0), (0.5, 0.9), (1.1, 2.0)):
        with pytest.raises(ValueError, match=f"low: {low}, high: {high}"):
            importance_correction(TRAIN_N, SAMPLER_N, mode="icepop", low=low, high=high)


@pytest.mark.parametrize(
    ("mode", "factors", "masked", "truncated"),
    [
        ("sequence_truncated", [2.5, 2.5, 0.25, 2.5, 0.25, 2.0], 0, 3),
        ("sequence_icepop", [0.0, 0.0, 0.0, 0.0, 0.0, 2.0], 5, 0),
    ],
)
def test_sequences_by_hand(mode: str, factors: list[float], masked: int, truncated: int):
    """Limits [0.5, 2.5]. Row 2: 4 * 1/2 * 2 = 4; row 0: 1/2 * 1/2 = 1/4; row 3: 2.

    Row 1 has no token. The ratios of the tokens themselves sum to 9.5.
    """
    ratio_N = torch.tensor([4.0, 0.5, 0.5, 2.0, 0.5, 2.0], dtype=torch.float64)
    rows = {"row_N": torch.tensor([2, 2, 0, 2, 0, 3]), "num_rows": 4}
    correction_N, metrics = importance_correction(
        ratio_N.log(), torch.zeros_like(ratio_N), mode=mode, low=0.5, high=2.5, **rows
    )
    assert correction_N.tolist() == pytest.approx(factors)
    values = {name: metric.item() for name, metric in metrics.items()}
    expected = {
        "correction_masked": masked,
        "correction_truncated": truncated,
        "sampler_ratio": 9.5,
        "sampler_kl": 9.5 - 6 - math.log(2),
        "sampler_ratio_bounded": 0,
        "correction": sum(factors),
        "correction_square": sum(factor**2 for factor in factors),
    }
    assert values == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["sequence_truncated", "sequence_icepop"])
def test_sequences_on_policy_order_and_non_finite(mode: str):
    """Equal policies: exactly 1. One bad token masks its row only, in whatever order."""
    options = {"mode": mode, "low": 0.5, "high": 2.0, "num_rows": 2}
    row_N = torch.tensor([0, 0, 1, 1])
    correction_N, _ = importance_correction(SAMPLER_N, SAMPLER_N, **options, row_N=row_N)
    assert correction_N.tolist() == [1.0] * 4
    for bad in (-math.inf, math.inf, math.nan):
        sampler_N = torch.tensor([-1.0, bad, -1.0, -2.0], dtype=torch.float64)
        train_N = torch.tensor([-1.0, -1.0, -1.2, -1.9], dtype=torch.float64)
        correction_N, metrics = importance_correction(train_N, sampler_N, **options, row_N=row_N)
        assert correction_N.tolist() == pytest.approx([0, 0, math.exp(-0.1), math.exp(-0.1)])
        assert metrics["correction_masked"].item() == 2
        order_N = torch.tensor([3, 1, 0, 2])
        mixed_N, _ = importance_correction(
            train_N[order_N], sampler_N[order_N], **options, row_N=row_N[order_N]
        )
        torch.testing.assert_close(mixed_N, correction_N[order_N])


def test_a_long_response_does_not_overflow():
    """200 tokens of ratio e: the product is e^200, above float32. Cut to `high`, or masked."""
    train_N, zeros_N = torch.full((200,), -1.0), torch.zeros(200, dtype=torch.int64)
    for mode, factor in (("sequence_truncated", 2.0), ("sequence_icepop", 0.0)):
        correction_N, _ = importance_correction(
            train_N, train_N - 1, mode=mode, low=0.5, high=2.0, row_N=zeros_N, num_rows=1
        )
        assert correction_N.tolist() == [factor] * 200


def test_off_policy_mask_by_hand():
    """delta 1/2. Mean log(old / new): row 0 .6, row 1 .5 (at the limit), row 2 .9 with A > 0.

    Row 3: .6, its NaN counts as 0 in the mean over two tokens, .3. Only row 0 is dropped.
    """
    row_N = torch.tensor([0, 0, 1, 2, 3, 3])
    drift_N = torch.tensor([1.0, 0.2, 0.5, 0.9, 0.6, math.nan], dtype=torch.float64)
    advantage_N = torch.tensor([-1.0, -1.0, -1.0, 2.0, -3.0, -3.0])
    old_logp_N = torch.zeros(6, dtype=torch.float64)
    options = {"num_rows": 5, "delta": 0.5}
    mask_N, metrics = off_policy_mask(-drift_N, old_logp_N, advantage_N, row_N, **options)
    assert mask_N.tolist() == [0, 0, 1, 1, 1, 1]
    assert metrics["off_policy_masked"].item() == 2
    order_N = torch.tensor([5, 1, 3, 0, 2, 4])
    mixed_N, _ = off_policy_mask(
        -drift_N[order_N], old_logp_N, advantage_N[order_N], row_N[order_N], **options
    )
    assert mixed_N.tolist() == mask_N[order_N].tolist()
    same_N, _ = off_policy_mask(old_logp_N, old_logp_N, advantage_N, row_N, num_rows=5, delta=0.0)
    assert same_N.tolist() == [1.0] * 6


def test_sequence_errors():
    limits = {"low": 0.5, "high": 2.0}
    with pytest.raises(ValueError, match="row_N and num_rows: mode 'sequence_icepop' needs"):
        importance_correction(TRAIN_N, SAMPLER_N, mode="sequence_icepop", **limits)
    zeros_N = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"delta: -0\.1 must be at least 0"):
        off_policy_mask(TRAIN_N, SAMPLER_N, TRAIN_N, zeros_N, num_rows=1, delta=-0.1)
    with pytest.raises(ValueError, match=r"row_N \(3,\)"):
        off_policy_mask(TRAIN_N, SAMPLER_N, TRAIN_N, zeros_N[:3], num_rows=1, delta=0.1)


@pytest.mark.parametrize(
    ("mode", "factors", "masked", "truncated"),
    [
        ("none", [1.0, 1.0, 1.0], 0, 0),
        ("truncated", [5.0, 1.0, 0.5], 0, 1),
        ("icepop", [0.0, 1.0, 0.5], 1, 0),
        ("sequence_truncated", [5.0, 5.0, 0.5], 0, 2),
        ("sequence_icepop", [0.0, 0.0, 0.5], 2, 0),
    ],
)
def test_a_ratio_that_would_overflow(
    mode: str, factors: list[float], masked: int, truncated: int
) -> None:
    """exp(94) is inf in float32. The token counts as exp(20) = 4.85e8, and is told."""
    log_ratio_N = torch.tensor([94.0, 0.0, math.log(0.5)])
    correction_N, metrics = importance_correction(
        log_ratio_N,
        torch.zeros(3),
        mode=mode,
        low=0.5,
        high=5.0,
        row_N=torch.tensor([0, 0, 1]),
        num_rows=2,
    )
    assert correction_N.tolist() == pytest.approx(factors)
    assert metrics["correction_masked"] == masked
    assert metrics["correction_truncated"] == truncated
    assert metrics["sampler_ratio"].item() == pytest.approx(math.exp(20) + 1.5)
    # Of a row both tokens have its ratio.
    assert metrics["sampler_ratio_bounded"] == (2 if mode.startswith("sequence") else 1)
