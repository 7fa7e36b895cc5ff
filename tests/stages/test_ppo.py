"""rl with advantage = gae: the critic's settings count, it learns, and a stopped stage goes on.

Legend: B rows, N flat response tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain.algorithms import KL, Gae
from posttrain.backends.checkpoint import load
from posttrain.backends.scalar import load_scalar, save_scalar
from posttrain.backends.tiny import character_tokenizer
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch
from posttrain.stages.config import build_config
from posttrain.stages.context import Context
from posttrain.stages.rl import add_advantages
from posttrain.stages.settings.rl import Rl

BASE: dict[str, Any] = {
    "steps": 5,
    "prompts_per_step": 8,
    "group_size": 2,
    "max_new_tokens": 6,
    "lr": 0.02,
    "warmup_steps": 1,
    "advantage": Gae(critic_lr=0.01),
    "num_minibatches": 2,
}
VALUES = {"value_loss", "value", "return", "value_clipped", "explained_variance"}
VALUES |= {"critic_grad_norm", "critic_lr"}


@pytest.fixture(scope="session")
def reward_model(models: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    language_model = load_scalar(models["one"])
    torch.manual_seed(3)
    torch.nn.init.normal_(language_model.model.score.weight, std=0.1)
    path = tmp_path_factory.mktemp("reward") / "model"
    save_scalar(language_model, path)
    record = {"format": 1, "name": "rm", "kind": "reward_model", "fingerprint": "3" * 64}
    (path / "record.json").write_text(json.dumps(record))
    return str(path)


@pytest.fixture
def ppo(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    def run(critic: str | None = None, work: Path | None = None, **changes: Any) -> Any:
        inputs = {"start": models["start"], **domains}
        if critic is not None:
            inputs["critic"] = critic
        return run_stage("rl", BASE | changes, inputs, work)

    return run


def test_metrics_of_the_critic(ppo: Callable[..., Any]) -> None:
    """From the start the first values are all 0: half of the squared returns is its loss, and with
    lambda 1 the returns are the rewards, once per token."""
    ran = ppo(advantage=Gae(1.0, critic_lr=0.01), kl=KL(0.1), num_minibatches=1)
    for line in ran.lines:
        assert {*VALUES, "reward", "entropy", "kl_reference", "grad_norm"} <= set(line)
        assert all(math.isfinite(value) for value in line.values())
        assert line["train_fraction"] == 1
        assert line["critic_lr"] == pytest.approx(line["lr"] / 2, rel=1e-4)
    first = ran.lines[0]
    assert first["value"] == 0 == first["explained_variance"]
    assert first["value_loss"] == pytest.approx(first["return"] / 2, rel=1e-4), "rewards are 0 or 1"
    assert ran.lines[-1]["value"] > 0


SETTINGS: list[dict[str, Any]] = [
    {"advantage": Gae(critic_lr=0.02)},
    {"advantage": Gae(), "lr": 0.01},
    {"advantage": Gae(critic_lr=0.01, lam=0.5)},
    {"advantage": Gae(critic_lr=0.01, gamma=0.9)},
    {"advantage": Gae(critic_lr=0.01, value_clip=0.01)},
    {"advantage": Gae(critic_lr=0.01, value_clip=None)},
    {"advantage": Gae(critic_lr=0.01, warmup_steps=2)},
    {"group_size": 1},
    {"mask_unfinished": True},
    {"kl": KL(0.5)},
    {"kl": KL(0.5, where="reward")},
    {"kl": KL(0.5, where="reward"), "advantage": Gae(critic_lr=0.01, gamma=0.9)},
    {"num_minibatches": 1},
    {"advantage": "group_zscore"},
    {"lr": 0.03},
]


def test_every_setting_changes_the_result(
    ppo: Callable[..., Any], same: Any, reward_model: str
) -> None:
    results = {"base": ppo()} | {str(changes): ppo(**changes) for changes in SETTINGS}
    results["critic"] = ppo(reward_model)
    names = list(results)
    alike = [
        (one, other)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
        if same(results[one], results[other])
    ]
    assert alike == []
    assert not VALUES & set(results[str({"advantage": "group_zscore"})].lines[0])
    assert results["critic"].lines[0]["value"] != 0


def test_without_a_critic_edge_it_starts_from_the_start(
    ppo: Callable[..., Any], same: Any, models: Mapping[str, str]
) -> None:
    assert same(ppo(), ppo(models["start"]))


def test_the_critics_learning_rate_is_the_policys_unless_given(
    ppo: Callable[..., Any], same: Any
) -> None:
    assert same(ppo(advantage="gae"), ppo(advantage=Gae(critic_lr=0.02)))


def test_the_policy_waits_for_the_critic(
    ppo: Callable[..., Any], models: Mapping[str, str]
) -> None:
    """In two steps of three the critic learns and the policy does not: what it samples in the third
    is what a policy samples that has not learned."""
    ran = ppo(advantage=Gae(critic_lr=0.01, warmup_steps=2), steps=3)
    for line in ran.lines[:2]:
        assert "grad_norm" not in line and line["critic_grad_norm"] > 0
    assert "grad_norm" in ran.lines[2]
    still = ppo(steps=3, lr=1e-30, advantage="gae")
    assert [line["reward"] for line in ran.lines] == [line["reward"] for line in still.lines]
    start = load_file(f"{models['start']}/model.safetensors")
    assert any(not torch.equal(start[name], value) for name, value in ran.weights().items())


def test_reward_rises_and_values_follow(ppo: Callable[..., Any]) -> None:
    ran = ppo(steps=40, prompts_per_step=16, lr=0.01)
    rewards = [line["reward"] for line in ran.lines]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    values = [line["value"] for line in ran.lines]
    assert abs(values[-1] - rewards[-1]) < 0.25


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stopped_stage_ends_with_the_same_bits(
    ppo: Callable[..., Any],
    same: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reward_model: str,
    precision: str,
) -> None:
    """Stopped after step 3 with a checkpoint of step 2, which has both models and optimisers."""
    changes = {"kl": KL(0.1, where="reward", reference_every=2), "precision": precision}
    calm = ppo(reward_model, **changes)
    kept: dict[str, Tensor] = {}

    def stop(ctx: Context, step: int, state: Any) -> None:
        if step == 2:
            kept.update(state.state())
            ctx.save(step, state)
        if step == 3:
            raise KeyboardInterrupt

    work = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Context, "checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            ppo(reward_model, work, **changes)
    assert {name.split("/")[0] for name in kept} == {"policy", "critic", "reference"}
    assert "critic/weight.score.weight" in kept and "critic/optimizer.0.exp_avg" in kept
    resumed = ppo(reward_model, work, **changes)
    assert same(calm, resumed)
    clean = [[line | {"seconds": 0} for line in ran.lines] for ran in (calm, resumed)]
    assert clean[0] == clean[1]


class Constant:
    """A critic that values every state alike."""

    def __init__(self, value: float) -> None:
        self.value = value

    def values(self, batch: Batch) -> Tensor:
        return torch.full((batch.num_tokens,), self.value)


def judged(lengths: list[int], rewards: list[float], kl_N: list[float]) -> Batch:
    """Rows with these rewards, and log-probs that differ from the reference's by `kl_N`."""
    batch = Batch.from_tokens([[7]] * len(lengths), [[8] * n for n in lengths], pad_id=0)
    batch["group_B"] = torch.arange(len(lengths))
    batch["reward_B"] = torch.tensor(rewards)
    batch["kl_weight_B"] = torch.ones(len(lengths))
    batch["finished_B"] = torch.ones(len(lengths), dtype=torch.bool)
    batch["policy_logp_N"] = torch.tensor(kl_N)
    batch["ref_logp_N"] = torch.zeros(len(kl_N))
    return batch


def test_advantages_by_hand() -> None:
    """Rows of 2 and 1 tokens with rewards 1 and 0, values 0.5, gamma and lambda 1, and a KL of 1, 2
    and 3 that counts a tenth, in the second row a twentieth.

    Token rewards -0.1, 0.8 and -0.15, so returns 0.7, 0.8 and -0.15 and advantages 0.2, 0.3 and
    -0.65, whose mean is -0.05 and whose deviation, over 2, is sqrt((0.0625 + 0.1225 + 0.36) / 2).
    With the second row left out the advantages of the first are +-1/sqrt(2) / (1 + epsilon / std).
    """
    kl = KL(0.1, where="reward", estimator="k1")
    s = Rl(steps=1, advantage=Gae(lam=1.0), kl=kl)
    critic: Any = Constant(0.5)
    batch = judged([2, 1], [1.0, 0.0], [1.0, 2.0, 3.0])
    batch["kl_weight_B"] = torch.tensor([1.0, 0.5])
    assert add_advantages(s, batch, critic) == {"kl_reference": 2.0, "kl_bounded": 0.0}
    assert batch["return_N"].tolist() == pytest.approx([0.7, 0.8, -0.15])
    assert batch["old_value_N"].tolist() == [0.5] * 3
    std = math.sqrt((0.0625 + 0.1225 + 0.36) / 2) + 1e-4
    expected = [0.25 / std, 0.35 / std, -0.6 / std]
    assert batch["advantage_N"].tolist() == pytest.approx(expected, rel=1e-4)

    batch["finished_B"] = torch.tensor([True, False])
    add_advantages(Rl(steps=1, advantage=Gae(lam=1.0), kl=kl, mask_unfinished=True), batch, critic)
    half = 0.05 / (math.sqrt(0.005) + 1e-4)
    assert batch["advantage_N"][:2].tolist() == pytest.approx([-half, half], rel=1e-3)

    batch = judged([2, 1], [1.0, 0.0], [1.0, 2.0, 3.0])
    batch["kl_weight_B"] = torch.tensor([1.0, 0.5])
    add_advantages(Rl(steps=1, advantage="global", kl=kl), batch, None)
    assert "return_N" not in batch
    scale = 0.425 / (math.sqrt(2) * 0.425 + 1e-4)  # rewards 0.7 and -0.15
    assert batch["advantage_N"].tolist() == pytest.approx([scale, scale, -scale], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": {"kind": "batch", "critic_lr": 0.01}}, r"'advantage\.critic_lr': unknown"),
        ({"advantage": {"kind": "gae", "gamma": 1.1}}, r"'advantage\.gamma': 1\.1 is not allowed"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("rl", "mine", BASE | changes)


def test_a_critic_of_other_tokens_is_refused(
    ppo: Callable[..., Any],
    make_model: Callable[..., Any],
    save_model: Callable[[Any], str],
) -> None:
    other = replace(make_model(), tokenizer=character_tokenizer(["é"]))
    with pytest.raises(ConfigError, match=r"critic 'critic': its vocabulary differs .* token 'é'"):
        ppo(save_model(other))


def test_the_policy_says_nothing_that_its_critic_cannot_read(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    save_model: Callable[[Any], str],
) -> None:
    """It has a token that the critic has not, and would often say it. The reference goes along: the
    first log ratios are 0."""
    more = load(models["start"])
    more.tokenizer.add_tokens(["<one>"], special_tokens=True)
    more.model.resize_token_embeddings(len(more.tokenizer))
    weight_VD = more.model.get_output_embeddings().weight
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        weight_VD[-1] = 3 * torch.randn(weight_VD.shape[1], generator=generator)
    inputs = {"start": save_model(more), "critic": models["start"], **domains}
    ran = run_stage("rl", BASE | {"steps": 1, "kl": KL(0.1), "num_minibatches": 1}, inputs)
    rows = [json.loads(line) for line in (ran.out / "rollouts.jsonl").read_text().splitlines()]
    assert rows and all(token < len(weight_VD) - 1 for row in rows for token in row["ids"])
    assert ran.lines[0]["kl_reference"] == pytest.approx(0, abs=1e-5)
