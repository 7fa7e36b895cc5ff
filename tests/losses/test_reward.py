"""Reward-model losses: hand-derived values, gradients, invariances, K-wise weights."""

import math

import pytest
import torch
from torch import Tensor

from posttrain.losses.reward import bradley_terry, pointwise, prompt_weights


def make_pairs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rand = torch.rand(7, 4, generator=generator, dtype=torch.float64)
    chosen_P, rejected_P, weight_P, margin_P = (rand * torch.tensor([3, 3, 1, 2])).T
    return {
        "chosen_P": chosen_P,
        "rejected_P": rejected_P,
        "weight_P": weight_P + 0.1,
        "margin_P": margin_P,
    }


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_bradley_terry_by_hand():
    """c - r = log 3: -log sigmoid = log(4/3), gradient -(1 - 3/4) for c. Equal rewards: log 2, 1/2.

    Weight 2 for the second pair.
    """
    chosen_P, rejected_P = tensor(1 + math.log(3), -1.0), tensor(1.0, -1.0)
    weight_P = torch.tensor([1.0, 2.0])
    loss, metrics = bradley_terry(chosen_P, rejected_P, weight_P)
    assert loss.item() == pytest.approx(math.log(4 / 3) + 2 * math.log(2))
    loss.backward()
    assert chosen_P.grad is not None and rejected_P.grad is not None
    assert chosen_P.grad.tolist() == pytest.approx([-0.25, -1.0])
    assert rejected_P.grad.tolist() == pytest.approx([0.25, 1.0])
    expected = {
        "accuracy": 1.0,
        "margin": math.log(3),
        "reward_chosen": math.log(3),
        "reward_rejected": 0.0,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


def test_margin_and_centring_by_hand():
    """c = 2, r = 1, margin 1: log 2. Centring 0.01 * 3^2; its gradient is 0.02 * 3 for both."""
    chosen_P, rejected_P = tensor(2.0), tensor(1.0)
    one_P = torch.ones(1, dtype=torch.float64)
    loss, metrics = bradley_terry(chosen_P, rejected_P, one_P, margin_P=one_P, centring=0.01)
    assert loss.item() == pytest.approx(math.log(2) + 0.09)
    grads = torch.autograd.grad(loss, (chosen_P, rejected_P))
    assert [grad.item() for grad in grads] == pytest.approx([-0.5 + 0.06, 0.5 + 0.06])
    assert (metrics["accuracy"].item(), metrics["margin"].item()) == (1, 1)


def test_a_shift_changes_the_centring_alone():
    """The difference leaves the mean open: the same loss at any shift, until it is centred."""
    pairs = make_pairs()
    shifted = pairs | {name: pairs[name] + 5 for name in ("chosen_P", "rejected_P")}
    torch.testing.assert_close(bradley_terry(**shifted)[0], bradley_terry(**pairs)[0])
    centred = bradley_terry(**pairs, centring=0.01)[0]
    assert bradley_terry(**shifted, centring=0.01)[0] > centred + 1


def test_prompt_weights_by_hand():
    """Prompt 4 ranks three responses: 3 pairs of 1/3. Prompt -1 ranks two: 1 pair of 1."""
    weight_P, count = prompt_weights(torch.tensor([4, -1, 4, 4]))
    assert weight_P.tolist() == pytest.approx([1 / 3, 1, 1 / 3, 1 / 3])
    assert count == 2


def test_k_wise_is_the_mean_over_prompts_of_the_mean_over_pairs():
    """InstructGPT's Eq. 1 written out for prompts of 3, 1 and 3 pairs."""
    pairs = make_pairs()
    prompt_P = torch.tensor([0, 2, 0, 1, 2, 0, 2])
    weight_P, count = prompt_weights(prompt_P)
    loss, _ = bradley_terry(pairs["chosen_P"], pairs["rejected_P"], weight_P.double())
    difference_P = pairs["chosen_P"] - pairs["rejected_P"]
    means = [
        sum(-math.log(torch.sigmoid(d).item()) for d in difference_P[prompt_P == prompt])
        / int((prompt_P == prompt).sum())
        for prompt in range(3)
    ]
    assert loss.item() / count == pytest.approx(sum(means) / 3, rel=1e-6)


def test_pointwise_by_hand():
    """Logit log 3 with label 1: log(4/3), gradient -1/4; with label 0: log 4, gradient 3/4.

    Label 1/4 is where sigmoid(-log 3) = 1/4 is right: gradient 0, entropy of (1/4, 3/4).
    """
    reward_B = tensor(math.log(3), math.log(3), -math.log(3))
    label_B = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    loss, metrics = pointwise(reward_B, label_B, torch.tensor([1.0, 2.0, 1.0]))
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert loss.item() == pytest.approx(math.log(4 / 3) + 2 * math.log(4) + entropy)
    loss.backward()
    assert reward_B.grad is not None
    assert reward_B.grad.tolist() == pytest.approx([-0.25, 1.5, 0.0], abs=1e-12)
    assert metrics["accuracy"].item() == 2
    assert metrics["reward"].item() == pytest.approx(math.log(3))


def test_far_away_rewards_stay_finite():
    """-log sigmoid(-1000) = 1000 in float32, gradient -1; the pointwise loss alike."""
    far_P = torch.tensor([-1000.0], requires_grad=True)
    one_P = torch.ones(1)
    for loss, _ in (
        bradley_terry(far_P, torch.zeros(1), one_P),
        pointwise(far_P, one_P, one_P),
    ):
        assert loss.item() == 1000
        assert torch.autograd.grad(loss, far_P)[0].item() == -1


def test_gradcheck():
    pairs = make_pairs()
    rewards = [pairs.pop(name).requires_grad_() for name in ("chosen_P", "rejected_P")]
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry(c, r, **pairs, centring=0.3)[0], rewards
    )
    label_B = torch.linspace(0, 1, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda r: pointwise(r, label_B, pairs["weight_P"])[0], rewards[:1]
    )


def test_padding_order_and_parts():
    """Weight 0 with anything in it, another order and two calls leave everything as it is."""
    pairs = make_pairs()
    pair_loss, pair_metrics = bradley_terry(**pairs, centring=0.3)
    rows = {
        "reward_B": pairs["chosen_P"] - 1.5,
        "label_B": (pairs["margin_P"] > 1).double(),
        "weight_B": pairs["weight_P"],
    }
    row_loss, row_metrics = pointwise(**rows)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    bad = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    for batch, loss_of, loss, metrics in (
        (pairs, lambda **b: bradley_terry(**b, centring=0.3), pair_loss, pair_metrics),
        (rows, pointwise, row_loss, row_metrics),
    ):
        weight = next(name for name in batch if name.startswith("weight"))
        leaf = next(iter(batch))
        batch[leaf].requires_grad_()
        padded = {name: torch.cat([value, bad])[order] for name, value in batch.items()}
        padded[weight] = torch.cat([batch[weight], torch.zeros(2)])[order]
        again, again_metrics = loss_of(**padded)
        torch.testing.assert_close(again, loss)
        grads = [torch.autograd.grad(x, batch[leaf])[0] for x in (again, loss_of(**batch)[0])]
        torch.testing.assert_close(*grads)
        parts = [
            loss_of(**{name: value[part] for name, value in batch.items()})
            for part in (slice(0, 3), slice(3, 7))
        ]
        torch.testing.assert_close(parts[0][0] + parts[1][0], loss)
        for name, value in metrics.items():
            torch.testing.assert_close(again_metrics[name], value)
            torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)


def test_errors():
    pairs = make_pairs()
    for centring in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"centring: {centring} must be at least 0"):
            bradley_terry(**pairs, centring=centring)
    with pytest.raises(ValueError, match=r"margin_P \(2,\)"):
        bradley_terry(**pairs | {"margin_P": torch.zeros(2)})
    one_B = torch.ones(2)
    for bad in (1.5, -0.5, math.nan):
        with pytest.raises(ValueError, match=r"label_B: every label must be in \[0, 1\]"):
            pointwise(one_B, torch.tensor([0.5, bad]), one_B)
