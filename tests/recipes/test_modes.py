"""Modes and noise in the recipe language: the handles carry them to the stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.recipe import Recipe
from posttrain.rewards.spec import VerifierSpec
from posttrain.suites.domain import Domain, Suite, Table
from posttrain.suites.load import load_suite

BOTH = ("think", "no_think")


@pytest.fixture
def core() -> Recipe:
    return Recipe(*load_suite("core"))


def own(tmp_path: Path, **overrides: Any) -> Recipe:
    """Two domains: `can` has thoughts, `cannot` has none."""
    rows = [{"prompt": f"{i}", "answer": f"{i}", "demo": f"{i}", "t": "hm"} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verifier = VerifierSpec(name="exact")
    tables = {
        "can": Table(train="rows.jsonl", demo="demo", thought="t"),
        "cannot": Table(train="rows.jsonl", demo="demo"),
    }
    domains = {n: Domain(name=n, source=t, verifier=verifier) for n, t in tables.items()}
    return Recipe(Suite(name="mine", domains=domains), tmp_path, overrides=overrides)


def test_handles_set_modes_and_noise_of_their_stages(core: Recipe) -> None:
    base = core.pretrain(data=core.demos("add", mode=BOTH, noise=0.3), thinking=True, steps=1)
    sft = core.sft(start=base, data=core.demos("add", mode="think", noise=0.1), steps=1)
    rl = core.rl(start=sft, prompts=core.prompts("add", mode="no_think"), steps=1)
    student = core.distill(
        start=sft, teachers={"add": rl}, prompts=core.prompts("add", mode=BOTH), steps=1
    )
    core.sample(student, prompts=core.prompts("add", mode=BOTH))
    plain = core.rl(start=sft, prompts=core.prompts("add"), steps=1, name="plain")
    last = core.evaluate(student, init=base, domains=["add"], modes=BOTH)
    nodes = {**core.graph(last).nodes}
    configs = {name: node.config for name, node in nodes.items() if name != "add"}
    assert {name: config["modes"] for name, config in configs.items()} == {
        "base": list(BOTH),
        "sft": ["think"],
        "rl": ["no_think"],
        "student": list(BOTH),
        "rollouts": list(BOTH),
        plain.name: [],
        "evaluation": list(BOTH),
    }
    assert (configs["base"]["demo_noise"], configs["sft"]["demo_noise"]) == (0.3, 0.1)


def test_an_override_wins_over_the_handle(tmp_path: Path) -> None:
    r = own(tmp_path, **{"sft.modes": ["no_think"], "sft.demo_noise": 0.4})
    base = r.pretrain(data=r.demos("can"), thinking=True, steps=1)
    sft = r.sft(start=base, data=r.demos("can", mode="think", noise=0.1), steps=1)
    config = r.graph(sft).nodes["sft"].config
    assert (config["modes"], config["demo_noise"]) == (["no_think"], 0.4)


def test_a_mode_that_is_none_is_refused(core: Recipe) -> None:
    for handle in (core.prompts, core.demos):
        with pytest.raises(ConfigError, match="'fast' is not a mode; choices: think, no_think"):
            handle("add", mode="fast")


def test_thinking_demonstrations_need_thoughts(tmp_path: Path) -> None:
    r = own(tmp_path)
    r.demos("can", mode=BOTH)
    r.demos(["can", "cannot"], mode="no_think")
    r.prompts(["can", "cannot"], mode="think")
    with pytest.raises(ConfigError, match=r"domain 'cannot' .* name the column .* thought = "):
        r.demos(["can", "cannot"], mode=BOTH)


def test_data_stages_bring_their_own_modes(core: Recipe) -> None:
    base = core.pretrain(data=core.demos("add"), thinking=True, steps=1)
    data = core.select(core.sample(base, prompts=core.prompts("add", mode=BOTH)))
    core.sft(start=base, data=data, steps=1)
    for setting in ({"modes": ["think"]}, {"demo_noise": 0.2}):
        with pytest.raises(ConfigError, match=rf"field '{next(iter(setting))}': .*is not read"):
            core.sft(start=base, data=data, steps=1, name=f"with_{next(iter(setting))}", **setting)


def test_noise_is_a_share(core: Recipe) -> None:
    base = core.pretrain(data=core.demos("add"), steps=1)
    with pytest.raises(ConfigError, match=r"stage 'sft' \(sft\), field 'demo_noise': 1.5"):
        core.sft(start=base, data=core.demos("add", noise=1.5), steps=1)
