"""The critic: values where they belong, updates that reach the returns, exact continuation.

Legend: B rows, N flat response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from posttrain.algorithms import Gae
from posttrain.backends.checkpoint import save
from posttrain.backends.local import LocalBackend
from posttrain.backends.scalar import load_scalar, save_scalar
from posttrain.backends.tiny import character_tokenizer
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch, Minibatch
from posttrain.rl.gae import gae, token_rewards
from posttrain.stages.context import Context
from posttrain.stages.critic import Critic, value_metrics
from posttrain.stages.settings.rl import Rl

GAE = Rl(steps=1, lr=0.1, advantage="gae")
LENGTHS = [(3, 2), (3, 5), (7, 5), (1, 1), (4, 6), (5, 5)]


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = (
        [torch.randint(5, 90, (pair[i],), generator=generator).tolist() for pair in LENGTHS]
        for i in range(2)
    )
    return Batch.from_tokens(prompts, responses, pad_id=0)


@pytest.fixture
def scored(models: Mapping[str, str], tmp_path: Path) -> str:
    """A reward model with a random score."""
    language_model = load_scalar(models["start"])
    torch.manual_seed(3)
    torch.nn.init.normal_(language_model.model.score.weight)
    save_scalar(language_model, tmp_path / "scored")
    return str(tmp_path / "scored")


@pytest.fixture
def critic(models: Mapping[str, str], tmp_path: Path) -> Callable[..., Critic]:
    """`critic(start, max_tokens)`: a critic that starts from a checkpoint."""

    def make(start: str, max_tokens: int = 8192) -> Critic:
        inputs = {"start": models["start"], "critic": start}
        work = tmp_path / "work"
        ctx = Context(name="rl", work=work, inputs=inputs, threads=1, backend=LocalBackend())
        made: Any = Critic(GAE, ctx, ctx.learner(GAE))
        made.learner.max_tokens = made.scorer.max_tokens = max_tokens
        return cast(Critic, made)

    return make


def asked(return_N: Tensor, old_value_N: Tensor, seed: int = 0) -> Batch:
    """The rows with what a value loss reads."""
    rows = batch(seed)
    rows["return_N"], rows["old_value_N"] = return_N, old_value_N
    return rows


def part(rows: Batch) -> Minibatch:
    """All rows in one minibatch."""
    return Minibatch(number=0, rows=rows, count=float(len(rows)), num_tokens=rows.num_tokens)


def clipped(clip: float | None) -> Rl:
    return Rl(steps=1, lr=0.01, advantage=Gae(value_clip=clip))


def targets(rows: Batch) -> Tensor:
    """A return for every token: the number of its row, and how far it is from the row's start."""
    row_N = rows.row_N
    first_N = (rows.sampled_len_B.cumsum(0) - rows.sampled_len_B)[row_N]
    return row_N.float() + 0.1 * (torch.arange(len(row_N)) - first_N)


@pytest.mark.parametrize("max_tokens", [13, 10_000])
def test_a_value_is_the_score_of_the_tokens_before(
    critic: Callable[..., Critic], scored: str, max_tokens: int
) -> None:
    """By transformers alone, one forward pass per state: the score of the prompt and the response
    tokens so far is the value before the next one."""
    model = AutoModelForSequenceClassification.from_pretrained(scored)
    rows, expected = batch(), []
    for row_T, (start, length) in zip(rows.tokens_BT, LENGTHS, strict=True):
        for end in range(start, start + length):
            with torch.no_grad():
                expected.append(float(model(input_ids=row_T[None, :end]).logits))
    value_N = critic(scored, max_tokens).values(rows)
    assert value_N.tolist() == pytest.approx(expected, abs=1e-4)
    assert value_N.std() > 0.5 and value_N.dtype == torch.float32 and not value_N.requires_grad


def test_the_loss_by_hand(critic: Callable[..., Critic], scored: str) -> None:
    """Half the squared error; with a clip of 0.1 around old values that are too low and too high by
    1 in turn, the larger of both errors. Means over all tokens."""
    return_N = targets(batch())
    values = critic(scored).values(batch()).tolist()
    plain = critic(scored).update(clipped(None), [part(asked(return_N, torch.zeros(24)))], lr=0.0)
    expected = sum((v - g) ** 2 / 2 for v, g in zip(values, return_N.tolist(), strict=True)) / 24
    assert plain["value_loss"] == pytest.approx(expected, rel=1e-4)

    sign_N = 1.0 - 2 * (torch.arange(24) % 2)
    old_N = torch.tensor(values) - sign_N
    found = critic(scored).update(clipped(0.1), [part(asked(return_N, old_N))], lr=0.0)
    losses, stopped = [], 0
    for v, g, sign in zip(values, return_N.tolist(), sign_N.tolist(), strict=True):
        near = v - 0.9 * sign
        losses.append(max((v - g) ** 2, (near - g) ** 2) / 2)
        stopped += (near - g) ** 2 > (v - g) ** 2
    assert found["value_loss"] == pytest.approx(sum(losses) / 24, rel=1e-4)
    assert found["value_clipped"] == pytest.approx(stopped / 24)
    assert 0 < stopped < 24
    assert found["value"] == pytest.approx(sum(values) / 24, rel=1e-4)
    assert found["return"] == pytest.approx(float(return_N.mean()), rel=1e-5)


def test_updates_bring_the_values_to_the_returns(
    critic: Callable[..., Critic], models: Mapping[str, str]
) -> None:
    """From a language model every value is 0 at first, and explains nothing."""
    ours, rows = critic(models["start"]), batch()
    return_N = targets(rows)
    assert ours.values(rows).tolist() == [0.0] * 24
    found = [
        ours.update(clipped(0.5), [part(asked(return_N, ours.values(rows)))], lr=0.01)
        for _ in range(80)
    ]
    assert found[0]["value_loss"] == pytest.approx(float(return_N.square().mean() / 2), rel=1e-5)
    assert found[0]["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert found[-1]["explained_variance"] > 0.9
    assert found[-1]["value_loss"] < 0.05 * found[0]["value_loss"]
    assert (ours.values(rows) - return_N).abs().mean() < 0.3


def test_splitting_and_the_order_of_rows_change_only_rounding(
    critic: Callable[..., Critic], scored: str
) -> None:
    rows = asked(targets(batch()), torch.linspace(-1, 1, 24))
    found = [
        critic(scored, max_tokens).update(clipped(0.2), [part(rows)], lr=0.0)
        for max_tokens in (8192, 13)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)

    order_B = torch.tensor([4, 0, 5, 2, 3, 1])
    turned = critic(scored).update(clipped(0.2), [part(rows.select(order_B))], lr=0.0)
    assert turned == pytest.approx(found[0], rel=1e-4)


def test_metrics_of_several_updates() -> None:
    """Two updates of 2 and 1 tokens, returns 1, 3 and 2, errors 1, 1 and 1: all variance is
    explained. Norms are averaged over updates, all else over tokens."""
    names = ("value_loss", "value_tokens", "value", "value_clipped", "grad_norm")
    names += ("return", "return_square", "value_error", "value_error_square")
    one = dict(zip(names, (1.0, 2.0, 2.0, 1.0, 3.0, 4.0, 10.0, 2.0, 2.0), strict=True))
    two = dict(zip(names, (0.5, 1.0, 1.0, 0.0, 1.0, 2.0, 4.0, 1.0, 1.0), strict=True))
    assert value_metrics([one, two]) == pytest.approx(
        {
            "value_loss": 0.5,
            "value": 1.0,
            "return": 2.0,
            "value_clipped": 1 / 3,
            "explained_variance": 1.0,
            "critic_grad_norm": 2.0,
        }
    )


def test_a_restored_critic_goes_on_with_the_same_bits(
    critic: Callable[..., Critic], scored: str
) -> None:
    def steps(ours: Critic, first: int, last: int) -> None:
        for step in range(first, last):
            rows = asked(targets(batch()), ours.values(batch(step)), step)
            ours.update(clipped(0.2), [part(rows)], lr=0.01)

    whole, stopped, resumed = (critic(scored) for _ in range(3))
    steps(whole, 0, 5)
    steps(stopped, 0, 2)
    resumed.restore({name: tensor.clone() for name, tensor in stopped.state().items()})
    steps(resumed, 2, 5)
    for name, tensor in whole.state().items():
        assert torch.equal(resumed.state()[name], tensor), name
    assert torch.equal(whole.values(batch()), resumed.values(batch()))


def test_values_and_gae_fit_together(critic: Callable[..., Critic], scored: str) -> None:
    """With gamma and lambda 1 the advantage is the reward less the value, at every token, and the
    returns are the reward: what a value is learned from stands at its place."""
    rows = batch()
    value_N, row_N = critic(scored).values(rows), rows.row_N
    reward_B = torch.arange(6.0)
    reward_N = token_rewards(reward_B, row_N)
    advantage_N, return_N = gae(reward_N, value_N, row_N, num_rows=6, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantage_N, reward_B[row_N] - value_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(return_N, reward_B[row_N], atol=1e-5, rtol=1e-5)


def test_a_critic_takes_either_start_and_the_policys_tokens_only(
    critic: Callable[..., Critic],
    models: Mapping[str, str],
    scored: str,
    make_model: Any,
    tmp_path: Path,
) -> None:
    assert not critic(models["start"]).values(batch()).any()
    assert critic(scored).values(batch()).all()
    save(make_model(vocabulary=104), tmp_path / "padded")
    assert not critic(str(tmp_path / "padded")).values(batch()).any()
    other = replace(make_model(), tokenizer=character_tokenizer(["é"]))
    save(other, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"critic 'critic': its vocabulary differs .* token '.'"):
        critic(str(tmp_path / "other"))
