"""Auxiliary losses, frozen weights and moving averages in the stages that train."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain.algorithms import Aux
from posttrain.backends.local import LocalBackend
from posttrain.engine.errors import ConfigError
from posttrain.stages.aux_losses import aux_rows, demo_batch
from posttrain.stages.config import build_config
from posttrain.stages.context import Context
from posttrain.stages.settings.offline import Sft

RunStage = Callable[..., Any]
COMMON: dict[str, Any] = {"lr": 0.01, "warmup_steps": 1, "steps": 4}
ROLLOUT: dict[str, Any] = {"prompts_per_step": 6, "max_new_tokens": 5, "num_minibatches": 2}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 8},
    "dpo": {"batch_size": 8, "lr": 0.003},
    "rl": {**ROLLOUT, "group_size": 4},
    "distill": {**ROLLOUT, "routes": {"short": "t", "words": "t"}},
    "pretrain": {"batch_size": 8, "hidden_size": 16, "num_layers": 1, "max_positions": 32},
}
KINDS = list(STAGES)
MORE: dict[str, dict[str, Any]] = {
    "reward_model": {"batch_size": 8},
}
"""What trains and takes no auxiliary losses: it has no words to predict."""
TRAINING = [*KINDS, *MORE]


@pytest.fixture
def train(run_stage: RunStage, edges: Callable[..., Any]) -> Callable[..., Any]:
    """Run a stage of a kind; `more` are further edges."""

    def run(
        kind: str, more: Mapping[str, str] | None = None, work: Path | None = None, **changes: Any
    ) -> Any:
        settings = COMMON | (STAGES | MORE)[kind] | changes
        return run_stage(kind, settings, edges(kind, more), work)

    return run


def of_domains(domains: Mapping[str, str], name: str) -> dict[str, str]:
    return {edge.replace("domains", f"aux.{name}", 1): path for edge, path in domains.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_auxiliary_loss_is_learned_beside_the_main_one(
    train: Callable[..., Any], kind: str, data: str, domains: Mapping[str, str], same: Any
) -> None:
    """Weight, data, batch size and number of losses all count; without weight it is measured."""
    one, two = {"aux.ptx": data}, of_domains(domains, "other")
    plain = train(kind)
    runs = {
        "measured": train(kind, one, aux={"ptx": 0.0}),
        "light": train(kind, one, aux={"ptx": 0.1}),
        "heavy": train(kind, one, aux={"ptx": 5.0}),
        "small": train(kind, one, aux={"ptx": Aux(5.0, batch_size=4)}),
        "domains": train(kind, two, aux={"other": 5.0}),
        "both": train(kind, {**one, **two}, aux={"ptx": 5.0, "other": 5.0}),
    }
    for name, weight in runs["measured"].weights().items():
        torch.testing.assert_close(weight, plain.weights()[name], atol=1e-4, rtol=1e-4)
    learned = {n: ran for n, ran in runs.items() if n != "measured"} | {"plain": plain}
    names = list(learned)
    for i, name in enumerate(names):
        assert not any(same(learned[name], learned[other]) for other in names[i + 1 :]), name
    assert all("aux/ptx" not in line for line in plain.lines)
    for name in ("measured", "light", "heavy"):
        assert all(line["aux/ptx"] > 0 for line in runs[name].lines)
    assert runs["heavy"].lines[-1]["aux/ptx"] < runs["measured"].lines[-1]["aux/ptx"]
    assert set(runs["both"].lines[0]) - set(plain.lines[0]) == {"aux/ptx", "aux/other"}
    # The stage's own metrics do not hold the auxiliary loss: step 1 reads the start.
    assert runs["heavy"].lines[0]["tokens"] == plain.lines[0]["tokens"]
    if kind in ("sft", "dpo"):
        assert runs["heavy"].lines[0]["loss"] == pytest.approx(plain.lines[0]["loss"], rel=1e-5)


def test_the_metric_is_the_mean_cross_entropy_of_the_drawn_rows(
    train: Callable[..., Any], models: Mapping[str, str], data: str
) -> None:
    """All 60 rows are drawn in step 1, so that the mean can be computed without the draw."""
    line = train("sft", {"aux.ptx": data}, aux={"ptx": Aux(1.0, 60)}, steps=1).lines[0]
    scorer = LocalBackend().scorer(Path(models["start"]))
    rows = [json.loads(text) for text in Path(data, "data.jsonl").read_text().splitlines()]
    logp_N = scorer.logprobs(demo_batch(rows, scorer.chat))
    assert line["aux/ptx"] == pytest.approx(-float(logp_N.mean()), rel=1e-5)


def test_weighing_the_own_data_again_is_a_larger_loss(
    train: Callable[..., Any], data: str, run_stage: RunStage, models: Mapping[str, str]
) -> None:
    """sft on all rows of its data, and the same rows as auxiliary loss of weight 2: the gradient is
    three times that of sft alone, so its norm is."""
    inputs = {"start": models["start"], "data": data}
    settings = COMMON | {"batch_size": 60, "steps": 1}
    alone = run_stage("sft", settings, inputs).lines[0]
    more = settings | {"aux": {"again": Aux(2.0, 60)}}
    beside = run_stage("sft", more, inputs | {"aux.again": data}).lines[0]
    assert beside["aux/again"] == pytest.approx(beside["loss"], rel=1e-5)
    assert beside["grad_norm"] == pytest.approx(3 * alone["grad_norm"], rel=1e-4)


def test_rows_are_not_drawn_in_the_order_of_the_stage(
    train: Callable[..., Any], domains: Mapping[str, str]
) -> None:
    """The same domains twice: were they drawn alike, both losses would be equal."""
    line = train("sft", of_domains(domains, "own"), aux={"own": Aux(1.0, 8)}).lines[0]
    assert line["aux/own"] != pytest.approx(line["loss"], rel=1e-3)


def test_an_auxiliary_loss_needs_data(
    train: Callable[..., Any], undemonstrated: str, data: str
) -> None:
    with pytest.raises(ConfigError, match="aux = 'ptx' has a weight and no data"):
        train("sft", aux={"ptx": 1.0})
    with pytest.raises(ConfigError, match="domain 'bare' has no demonstration for problem"):
        train("sft", {"aux.ptx.bare": undemonstrated}, aux={"ptx": 1.0})
    Path(data, "data.jsonl").write_text("")
    with pytest.raises(ConfigError, match="its data has no rows"):
        train("sft", {"aux.ptx": data}, aux={"ptx": 1.0})
    with pytest.raises(ConfigError, match=r"aux\.ptx.*-1"):
        build_config("sft", "mine", {"steps": 1, "aux": {"ptx": -1}})


def test_a_name_does_not_take_the_edges_of_a_longer_one(
    tmp_path: Path, domains: Mapping[str, str], data: str
) -> None:
    inputs = of_domains(domains, "a") | {"aux.ab": data}
    ctx = Context(name="mine", work=tmp_path / "work", inputs=inputs, threads=1)
    found = aux_rows(Sft(steps=1, aux={"a": 1.0, "ab": 1.0}), ctx)
    assert {name: set(rows) for name, rows in found.items()} == {
        "a": {"short", "words"},
        "ab": {"short", "words"},
    }
    assert {row["demo"] for row in found["ab"]["short"]} == {f"{i}short" for i in range(7)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [kind for kind in TRAINING if kind != "pretrain"])
def test_frozen_weights_end_as_they_began(
    train: Callable[..., Any], kind: str, precision: str, models: Mapping[str, str]
) -> None:
    before = load_file(Path(models["start"]) / "model.safetensors")
    # The score of a reward model begins at 0: without it nothing would have a gradient.
    trainable = ["*.mlp.*"] + ["score.*"] * (kind == "reward_model")
    after = train(kind, trainable=trainable, precision=precision).weights()
    assert before.keys() - after.keys() <= {"lm_head.weight"}, "a reward model has no output layer"
    changed = {
        name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])
    }
    assert changed == {name for name in before if ".mlp." in name}


@pytest.mark.parametrize("kind", TRAINING)
def test_the_average_lags_behind_the_weights(train: Callable[..., Any], kind: str) -> None:
    """What is sampled and learned is the same with it, and it lies nearer to the start."""

    def averaged(ema: float, **changes: Any) -> Any:
        return train(kind, optimizer={"ema": ema}, **changes)

    plain, slow, slower = train(kind), averaged(0.5), averaged(0.9)
    for ran in (slow, slower):
        for mine, other in zip(ran.lines, plain.lines, strict=True):
            assert {k: v for k, v in mine.items() if k != "seconds"} == {
                k: v for k, v in other.items() if k != "seconds"
            }
    # The start as the stage leaves it after one step whose average keeps almost all of it.
    start = averaged(1 - 1e-9, steps=1).weights()

    def distance(ran: Any) -> float:
        return sum(float((w - start[name]).square().sum()) for name, w in ran.weights().items())

    assert 0 < distance(slower) < distance(slow) < distance(plain)


def test_a_glob_that_matches_nothing_fails_with_names(train: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"'\*\.expert\.\*' matches no parameter"):
        train("sft", trainable=["*.expert.*"])
    for changes in ({"trainable": []}, {"optimizer": {"ema": 0.0}}, {"optimizer": {"ema": 1.0}}):
        with pytest.raises(ConfigError, match="stage 'mine'"):
            build_config("sft", "mine", {"steps": 1} | changes)


@pytest.mark.parametrize("kind", TRAINING)
def test_a_stopped_stage_goes_on_to_the_same_bits(
    train: Callable[..., Any], kind: str, data: str, goes_on: Callable[..., Any]
) -> None:
    """With a moving average, frozen weights and an auxiliary loss; stopped after step 3, whose
    checkpoint is that of step 2."""
    settings: dict[str, Any] = {"optimizer": {"ema": 0.8}, "trainable": ["*.mlp.*", "*embed*"]}
    more: dict[str, str] = {}
    if kind in KINDS:
        more, settings = {"aux.ptx": data}, settings | {"aux": {"ptx": 0.5}}
    calm, _ = goes_on(lambda work: train(kind, more, work, **settings), saved=2, killed=3)
    assert [line["step"] for line in calm.lines] == [1, 2, 3, 4]
