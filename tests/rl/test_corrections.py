"""Importance corrections: hand-derived values, limits, non-finite sampler log-probabilities."""

import math

import pytest
import torch

from posttrain.rl.corrections import importance_correction

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
