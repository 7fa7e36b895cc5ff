"""Optimisers that take less memory: weights rounded at random, moments in 8 bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backends.base import LearnerSettings, TokenLoss
from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.local_learner import LocalLearner
from posttrain.backends.optimizer import FullPrecision, StochasticRounding, round_into
from posttrain.backends.precision import computing_copy
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch
from posttrain.stages.aux_losses import token_cross_entropy

MakeModel = Callable[..., LanguageModel]
LOSS = TokenLoss(token_cross_entropy, 1.0)
HOW = {"betas": (0.9, 0.98), "weight_decay": 0.1, "max_grad_norm": 1.0}


def settings(**more: Any) -> LearnerSettings:
    return LearnerSettings(**(HOW | more))


def stochastic(language_model: LanguageModel, **more: Any) -> LocalLearner:
    """A learner that has bfloat16 weights and no others."""
    narrow = computing_copy(language_model, torch.bfloat16)
    return LocalLearner(
        narrow, settings(dtype=torch.bfloat16, master="stochastic", **more), max_tokens=40
    )


def rows(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(5, 90, (6, 14), generator=generator).tolist()
    responses = [row[4 : 7 + i] for i, row in enumerate(draw)]
    return Batch.from_tokens([row[:4] for row in draw], responses, pad_id=0)


def run(learner: LocalLearner, first: int, last: int, *, lr: float = 1e-3) -> list[float]:
    losses = []
    for step in range(first, last):
        batch = rows(step % 3)
        sums = learner.update(batch, LOSS, count=batch.num_tokens, lr=lr)
        losses.append(sums["loss"] / batch.num_tokens)
    return losses


def weights(learner: LocalLearner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def test_rounding_is_right_on_average() -> None:
    """A number between two bfloat16 neighbours comes out as one of them, as often as it is near."""
    low, high = torch.tensor([1.0, -2.0]), torch.tensor([1.0 + 2**-7, -2.0 - 2**-6])
    exact = torch.tensor([1.0 + 2**-7 * 0.25, -2.0 - 2**-6 * 0.75])
    many = exact.repeat(20000, 1).contiguous()
    rounded = torch.empty(many.shape, dtype=torch.bfloat16)
    round_into(rounded, many, torch.Generator().manual_seed(0))
    up = (rounded.float() == high).float()
    assert bool(((rounded.float() == low) | (up == 1)).all())
    torch.testing.assert_close(up.mean(0), torch.tensor([0.25, 0.75]), atol=0.015, rtol=0)


def test_what_bfloat16_holds_is_not_changed() -> None:
    generator = torch.Generator().manual_seed(1)
    held = torch.randn(1000, generator=generator).to(torch.bfloat16)
    rounded = torch.empty_like(held)
    round_into(rounded, held.float(), generator)
    assert torch.equal(rounded, held)


def test_small_updates_are_not_lost(make_model: MakeModel) -> None:
    """Of 16 steps far below half a unit in the last place, the weights keep the sum on average."""
    start = make_model(positions=64)
    exact = LocalLearner(start, settings(dtype=torch.bfloat16), max_tokens=40)
    before = {n: p.detach().clone() for n, p in exact.master.named_parameters()}
    rounded = stochastic(make_model(positions=64))
    begin = weights(rounded)
    for learner in (exact, rounded):
        run(learner, 0, 16, lr=1e-5)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = dict(exact.master.named_parameters())[name].detach() - before[name]
    kept = (weights(rounded)[name] - begin[name]).float()
    changed = float((kept != 0).float().mean())
    assert 0.01 < changed < 0.5
    # Along the exact way the rounded weights have gone as far, though each of them jumps.
    along = float((kept * moved).sum() / (moved * moved).sum())
    assert along == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("more", [{}, {"ema": 0.5}, {"states": "int8"}], ids=str)
def test_a_learner_goes_on_with_the_same_bits(make_model: MakeModel, more: dict[str, Any]) -> None:
    if "states" in more:
        pytest.importorskip("bitsandbytes")
    whole = stochastic(make_model(vocabulary=100), **more)
    losses = run(whole, 0, 4)
    first = stochastic(make_model(vocabulary=100), **more)
    run(first, 0, 2)
    state = {name: value.clone() for name, value in first.state().items()}
    second = stochastic(make_model(vocabulary=100, seed=5), **more)
    second.restore(state)
    assert run(second, 2, 4) == losses[2:]
    for learner in (whole, second):
        learner.finish()
    assert all(torch.equal(weights(whole)[n], w) for n, w in weights(second).items())


def test_another_seed_rounds_otherwise(make_model: MakeModel) -> None:
    one, other = (stochastic(make_model(vocabulary=100), seed=seed) for seed in (0, 1))
    for learner in (one, other):
        run(learner, 0, 1)
    assert any(not torch.equal(weights(one)[n], w) for n, w in weights(other).items())


def test_rounded_weights_learn_as_full_ones_do(make_model: MakeModel) -> None:
    full = LocalLearner(make_model(vocabulary=100), settings(dtype=torch.bfloat16), max_tokens=40)
    rounded = stochastic(make_model(vocabulary=100))
    assert isinstance(full.optimizer, FullPrecision)
    assert isinstance(rounded.optimizer, StochasticRounding)
    expected, found = run(full, 0, 30), run(rounded, 0, 30)
    assert found[-1] < 0.7 * found[0]
    assert found[-1] == pytest.approx(expected[-1], rel=0.1)
    # There is one model, and nothing of it in float32.
    assert rounded.master is rounded.model
    assert {p.dtype for p in rounded.master.parameters()} == {torch.bfloat16}
    assert all(p.untyped_storage().nbytes() == 4 for p in rounded.parameters)


def test_moments_in_8_bits(make_model: MakeModel) -> None:
    pytest.importorskip("bitsandbytes")
    full = LocalLearner(make_model(vocabulary=200), settings(), max_tokens=40)
    narrow = LocalLearner(make_model(vocabulary=200), settings(states="int8"), max_tokens=40)
    expected, found = run(full, 0, 30), run(narrow, 0, 30)
    assert found[-1] == pytest.approx(expected[-1], rel=0.1)
    # The embedding is large enough for 8 bits, a norm is not.
    types = {n: t.dtype for n, t in narrow.state().items() if n.startswith("optimizer.0.")}
    assert types["optimizer.0.state1"] == types["optimizer.0.state2"] == torch.uint8
    assert torch.float32 in {t.dtype for n, t in narrow.state().items() if n.endswith("state1")}
    again = LocalLearner(make_model(vocabulary=200), settings(states="int8"), max_tokens=40)
    again.restore({name: value.clone() for name, value in narrow.state().items()})
    assert run(again, 30, 32) == run(narrow, 30, 32)
    assert all(torch.equal(weights(again)[n], w) for n, w in weights(narrow).items())


def test_without_the_library(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"states = 'int8' .* pip install 'posttrain\[optim8\]'"):
        LocalLearner(make_model(), settings(states="int8"))


def test_an_average_of_rounded_weights_is_in_float32(make_model: MakeModel) -> None:
    learner = stochastic(make_model(vocabulary=100), ema=0.9)
    run(learner, 0, 3)
    assert learner.average is not None
    assert {mean.dtype for mean in learner.average.averages} == {torch.float32}
    means = [mean.to(torch.bfloat16) for mean in learner.average.averages]
    learner.finish()
    assert all(torch.equal(m, w) for m, w in zip(means, learner.weights, strict=True))
