"""The rl stage: every setting changes what is learned, in the way that it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain.algorithms import KL, AdamW, Clip, ConstantSum, CosineDecay, IcePop, Truncated
from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config

RunStage = Callable[..., Any]
BASE: dict[str, Any] = {
    "steps": 5,
    "prompts_per_step": 6,
    "group_size": 4,
    "max_new_tokens": 6,
    "lr": 0.02,
    "warmup_steps": 1,
}


@pytest.fixture
def rl(
    run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    """Run rl from `start` with BASE and the given changes."""

    def run(**changes: Any) -> Any:
        return run_stage("rl", BASE | changes, {"start": models["start"], **domains})

    return run


def test_metrics_are_named_as_documented_and_finite(rl: Callable[..., Any]) -> None:
    ran = rl(kl={"coef": 0.1}, correction="icepop", num_minibatches=2)
    assert [line["step"] for line in ran.lines] == [1, 2, 3, 4, 5]
    expected = {"step", "total", "tokens", "seconds", "lr", "grad_norm", "entropy", "kl_reference"}
    expected |= {"reward", "reward/short", "reward/words", "response_length", "finished_share"}
    expected |= {"train_fraction", "clip_low", "clip_high", "ratio", "approx_kl"}
    expected |= {"correction_masked", "correction_truncated", "sampler_ratio", "correction"}
    for line in ran.lines:
        assert expected <= set(line)
        assert all(math.isfinite(value) for value in line.values())
        assert 0 < line["reward"] < 1
        assert line["reward"] == pytest.approx(
            (line["reward/short"] + line["reward/words"]) / 2, abs=1e-5
        )
        assert 0 < line["train_fraction"] <= 1
        assert 0 < line["entropy"] < math.log(100)
        assert 0 < line["finished_share"] <= 1
    assert ran.metrics == {"reward": ran.lines[-1]["reward"], "tokens": ran.lines[-1]["tokens"]}


def test_two_runs_are_the_same_run(
    rl: Callable[..., Any], same: Callable[..., bool], models: Mapping[str, str]
) -> None:
    one = rl()
    assert same(one, rl())
    start = load_file(f"{models['start']}/model.safetensors")
    assert any(not torch.equal(start[name], value) for name, value in one.weights().items())


ONE_UPDATE: list[dict[str, Any]] = [
    {"seed": 1},
    {"lr": 0.01},
    {"steps": 6},
    {"warmup_steps": 2},
    {"lr_decay": "constant"},
    {"lr_decay": "linear"},
    {"lr_decay": CosineDecay(end=0.5)},
    {"optimizer": AdamW(beta1=0.5)},
    {"optimizer": AdamW(beta2=0.5)},
    {"optimizer": AdamW(weight_decay=0.5)},
    {"optimizer": AdamW(max_grad_norm=1e-9)},
    {"prompts_per_step": 5},
    {"group_size": 3},
    {"max_new_tokens": 5},
    {"temperature": 0.7},
    {"num_minibatches": 2},
    {"advantage": "group_mean"},
    {"advantage": "leave_one_out"},
    {"advantage": "leave_one_out_zscore"},
    {"advantage": "batch"},
    {"aggregation": "sequence"},
    {"aggregation": "constant"},
    {"per_kept": True},
    {"kl": KL(0.5)},
    {"kl": KL(0.5, estimator="k2")},
    {"kl": KL(0.5, where="reward")},
    {"kl": KL(0.5, where="reward", estimator="k1")},
    {"kl": KL(0.5, where="reward", estimator="k2")},
    {"correction": Truncated(1.0)},
    {"correction": IcePop(high=1.0)},
    {"correction": IcePop(low=1.0)},
]


def test_every_setting_changes_the_result(rl: Callable[..., Any], same: Any) -> None:
    results = {"base": rl()} | {str(changes): rl(**changes) for changes in ONE_UPDATE}
    names = list(results)
    alike = [
        (one, other)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
        if same(results[one], results[other])
    ]
    assert alike == []


def test_settings_of_several_updates_change_the_result(rl: Callable[..., Any], same: Any) -> None:
    several = {"num_minibatches": 3, "lr": 0.05, "warmup_steps": 0}
    base = rl(**several)
    assert any(line["clip_low"] > 0 or line["clip_high"] > 0 for line in base.lines)
    assert any(abs(line["ratio"] - 1) > 1e-3 for line in base.lines)
    for other in (Clip(ratio="sequence"), Clip(clip_low=0.01), Clip(clip_high=0.01)):
        assert not same(base, rl(**several, surrogate=other)), other
    tight = rl(**several, surrogate=Clip(0.01, 0.01))
    assert tight.lines[0]["clip_low"] + tight.lines[0]["clip_high"] > (
        base.lines[0]["clip_low"] + base.lines[0]["clip_high"]
    )


def first_step(ran: Any) -> float:
    return float(ran.lines[0]["grad_norm"])


def test_leave_one_out_is_the_group_mean_scaled(rl: Callable[..., Any]) -> None:
    """r - mean of the others = (r - mean) G / (G - 1): the gradient grows by 4/3 for G = 4."""
    mean = first_step(rl(steps=1, advantage="group_mean"))
    others = first_step(rl(steps=1, advantage="leave_one_out"))
    assert others == pytest.approx(mean * 4 / 3, rel=1e-4)


def test_the_constant_divides_the_gradient(rl: Callable[..., Any]) -> None:
    by_limit = first_step(rl(steps=1, aggregation="constant"))
    by_twelve = first_step(rl(steps=1, aggregation=ConstantSum(12)))
    assert by_limit == pytest.approx(2 * by_twelve, rel=1e-4)


def test_the_share_of_masked_tokens_is_logged(rl: Callable[..., Any]) -> None:
    """Two engines never agree to the last bit: with bounds [1, 1] nearly every token is masked, and
    with the usual ones none is."""
    usual = rl(correction="icepop")
    strict = rl(correction=IcePop(1.0, 1.0))
    for loose, tight in zip(usual.lines, strict.lines, strict=True):
        assert loose["correction_masked"] == 0
        assert loose["sampler_ratio"] == pytest.approx(1, abs=1e-4)
        assert 0.3 < tight["correction_masked"] <= 1


def test_a_kl_penalty_holds_the_policy_near_its_start(rl: Callable[..., Any]) -> None:
    settings = {"steps": 12, "prompts_per_step": 8, "lr": 0.003, "advantage": "group_mean"}
    for how in (
        {"estimator": "k3"},
        {"estimator": "k2"},
        {"where": "reward", "estimator": "k1"},
    ):
        free = rl(**settings, kl=KL(1e-6, **how))
        held = rl(**settings, kl=KL(1.0, **how))
        # The policy of the first step is the reference itself.
        assert abs(held.lines[0]["kl_reference"]) < 1e-4
        assert held.lines[-1]["kl_reference"] < 0.5 * free.lines[-1]["kl_reference"]


def test_reward_rises(rl: Callable[..., Any]) -> None:
    ran = rl(steps=25, prompts_per_step=16, lr=0.01, warmup_steps=0)
    first = sum(line["reward"] for line in ran.lines[:3]) / 3
    last = sum(line["reward"] for line in ran.lines[-3:]) / 3
    assert last > first + 0.2


def test_a_step_without_any_contrast_changes_nothing(
    run_stage: RunStage, models: Mapping[str, str], undemonstrated: str
) -> None:
    """A random model never hits an exact answer: every group is dropped and no update is made."""
    inputs = {"start": models["start"], "domains.bare": undemonstrated}
    ran = run_stage("rl", BASE, inputs)
    assert [line["train_fraction"] for line in ran.lines] == [0, 0, 0, 0, 0]
    start = load_file(f"{models['start']}/model.safetensors")
    assert all(torch.equal(start[name], value) for name, value in ran.weights().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": {"coef": 0.1, "estimator": "k1"}}, "gradient of log"),
        ({"kl": {"estimator": "k2"}}, r"field 'kl\.coef': a value is needed"),
        ({"aggregation": {"kind": "token", "constant": 5}}, r"'aggregation\.constant': unknown"),
        ({"correction": {"kind": "truncated", "low": 0.4}}, r"'correction\.low': unknown option"),
        ({"correction": {"kind": "icepop", "low": 1.5}}, r"'correction\.low': 1\.5 is not allowed"),
        ({"correction": {"kind": "icepop", "high": 0.5}}, r"'correction\.high': 0\.5 is not all"),
        ({"lr_decay": {"kind": "constant", "end": 0.5}}, r"'lr_decay\.end': unknown option"),
        ({"surrogate": {"kind": "clip", "clip_low": 1.5}}, r"'surrogate\.clip_low': 1\.5 is not"),
        ({"group_size": 1}, "group_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"advantage": "zscore"}, "there is no 'zscore'; did you mean 'group_zscore'"),
        ({"lr": float("nan")}, "lr"),
        ({"grup_size": 4}, "did you mean 'group_size'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        build_config("rl", "mine", BASE | changes)
    assert "stage 'mine' (rl)" in str(raised.value)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_ids_without_a_token_are_neither_drawn_nor_learned(
    run_stage: Callable[..., Any],
    make_model: Callable[..., Any],
    save_model: Callable[..., str],
    domains: Mapping[str, str],
    top_p: float,
) -> None:
    """28 loud rows beyond the tokens: sampler, learner and reference leave them out alike."""
    language_model = make_model("llama", stop=list(range(4, 30)), vocabulary=128)
    with torch.no_grad():
        language_model.model.lm_head.weight[100:] *= 20
    start = save_model(language_model)
    settings = {
        "steps": 1, "prompts_per_step": 12, "group_size": 4, "max_new_tokens": 6,
        "warmup_steps": 0, "correction": "truncated", "kl": {"coef": 0.1}, "top_p": top_p,
    }  # fmt: skip
    ran = run_stage("rl", settings, {"start": start, **domains})
    (line,) = ran.lines
    assert line["sampler_ratio"] == pytest.approx(1, abs=1e-4)
    assert line["kl_reference"] == pytest.approx(0, abs=1e-4)
    if top_p == 1:
        # Of 100 tokens; loud rows would leave next to nothing.
        assert line["entropy"] > 1
    before = load_file(start + "/model.safetensors")["lm_head.weight"][100:]
    assert torch.equal(load_file(ran.out / "model.safetensors")["lm_head.weight"][100:], before)
