"""Stages in bfloat16: they run, come near what float32 gives, and train float32 weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

RunStage = Callable[..., Any]
OPTIM: dict[str, Any] = {"steps": 4, "lr": 1e-3, "warmup_steps": 1}
ROLLOUT: dict[str, Any] = {"prompts_per_step": 24, "max_new_tokens": 6}
ROUTES = {"routes": {"short": "one", "words": "two"}}
# Settings, and metrics with the relative distance that is allowed. Sampled tokens differ in
# bfloat16, so metrics of stages that sample differ by chance too.
STAGES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "pretrain": (OPTIM | {"batch_size": 16}, {"loss": 0.01, "grad_norm": 0.02}),
    "sft": (OPTIM | {"batch_size": 16}, {"loss": 0.01, "grad_norm": 0.02}),
    "rl": (
        OPTIM | ROLLOUT | {"group_size": 4, "kl": {"coef": 0.1}, "num_minibatches": 2},
        {"entropy": 0.05, "response_length": 0.2, "grad_norm": 0.5},
    ),
    "distill": (OPTIM | ROLLOUT | ROUTES, {"kl": 0.1, "entropy": 0.05, "grad_norm": 0.5}),
}


@pytest.mark.parametrize("kind", STAGES)
def test_training_comes_near_float32(
    kind: str, run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str]
) -> None:
    settings, near = STAGES[kind]
    inputs = dict(domains)
    if kind != "pretrain":
        inputs["start"] = models["start"]
    if kind == "distill":
        inputs |= {"teachers.one": models["one"], "teachers.two": models["two"]}
    exact = run_stage(kind, settings, inputs)
    rounded = run_stage(kind, settings | {"precision": "bfloat16"}, inputs)
    assert len(rounded.lines) == len(exact.lines) == 4
    for one, other in zip(exact.lines, rounded.lines, strict=True):
        for metric, distance in near.items():
            assert other[metric] == pytest.approx(one[metric], rel=distance), metric
            assert other[metric] != one[metric], "the setting was read"
    weights = rounded.weights()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any(
        not torch.equal(value, value.to(torch.bfloat16).float()) for value in weights.values()
    )
    assert json.loads((rounded.out / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("estimator", ["sampled_token", "top_k"])
def test_other_estimators_come_near_float32(
    estimator: str, run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str]
) -> None:
    inputs = {"start": models["start"], "teachers.one": models["one"], **domains}
    inputs["teachers.two"] = models["two"]
    settings = OPTIM | ROLLOUT | ROUTES | {"steps": 2, "estimator": estimator}
    kls = [
        [line["kl"] for line in run_stage("distill", settings | changed, inputs).lines]
        for changed in ({}, {"precision": "bfloat16"})
    ]
    assert kls[1] == pytest.approx(kls[0], rel=0.3)
    assert kls[1] != kls[0]


@pytest.mark.parametrize("kind", ["evaluate", "sample"])
def test_frozen_models_answer_in_bfloat16(
    kind: str, run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str]
) -> None:
    settings: dict[str, Any] = {"num_problems": 20, "max_new_tokens": 6, **ROUTES}
    inputs = {"student": models["start"], "init": models["start"], **domains}
    inputs |= {"teachers.one": models["one"], "teachers.two": models["two"]}
    file = "transcripts.json"
    if kind == "sample":
        routes = {"routes": {"short": ["model"], "words": ["model"]}}
        settings = {"num_prompts": 20, "k": 2, "max_new_tokens": 6} | routes
        inputs, file = {"models.model": models["start"], **domains}, "rollouts.jsonl"
    exact = run_stage(kind, settings, inputs)
    rounded = run_stage(kind, settings | {"precision": "bfloat16"}, inputs)
    # Recovery, and with it the norm, is not given where teacher and init are too close.
    assert exact.metrics.keys() - {"norm"} == rounded.metrics.keys() - {"norm"}
    assert (exact.out / file).read_text() != (rounded.out / file).read_text()
