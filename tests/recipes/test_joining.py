"""What joins several things in one stage: r.merge and aux=, from the recipe to the lineage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.algorithms import AdamW, Aux, TaskArithmetic, Ties
from posttrain.engine import ancestry
from posttrain.engine.errors import ConfigError
from posttrain.engine.record import Artifact
from posttrain.engine.runner import run
from posttrain.engine.store import Store
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe
from posttrain.stages.worker import EXECUTE, PRELOAD
from posttrain.suites.domain import Suite

FAST: dict[str, Any] = {"lr": 2e-3, "warmup_steps": 1}


@pytest.fixture
def build(tmp_path: Path, two_domains: Suite) -> Any:
    def build(overrides: Mapping[str, Any] | None = None) -> Recipe:
        return Recipe(two_domains, tmp_path, overrides=overrides)

    return build


def two(r: Recipe) -> tuple[Stage, Stage, Stage]:
    """A base, and a model of each domain."""
    base = r.pretrain(data=r.demos(r.domains), steps=40, **FAST)
    one, other = (
        r.sft(start=base, data=r.demos(d), steps=10, name=f"on_{d}", **FAST) for d in r.domains
    )
    return base, one, other


def edges(r: Recipe, stage: Stage) -> dict[str, str]:
    return dict(r.graph(stage).nodes[stage.name].inputs)


def test_models_are_named_by_the_recipe_or_after_their_stages(build: Any) -> None:
    r = build()
    _, one, other = two(r)
    named = r.merge({"a": one, "b": other}, weights={"a": 2.0}, name="named")
    assert edges(r, named) == {"models.a": "on_whole", "models.b": "on_last"}
    assert r.graph(named).nodes["named"].config["weights"] == {"a": 2.0}
    listed = r.merge([one, other], name="listed")
    assert edges(r, listed) == {"models.on_whole": "on_whole", "models.on_last": "on_last"}
    # A merged model is a model: it can be a start, and be merged again.
    again = r.merge([r.sft(start=named, data=r.demos("last"), steps=1), listed], name="again")
    assert edges(r, again) == {"models.sft": "sft", "models.listed": "listed"}


def test_the_other_ways_add_to_a_base(build: Any) -> None:
    r = build()
    base, one, other = two(r)
    merged = r.merge([one, other], base=base, how=Ties(density=0.5))
    assert edges(r, merged)["base"] == "base"
    alone = r.merge([one], base=base, how=TaskArithmetic(0.5), name="alone")
    assert edges(r, alone) == {"models.on_whole": "on_whole", "base": "base"}


def refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_merges_without_sense_are_refused_while_planning(build: Any) -> None:
    r = build()
    base, one, other = two(r)
    sampled = r.sample(one, prompts=r.prompts(r.domains))
    refused(lambda: r.merge([one, other], how="ties", name="m1"), "ties adds to a base; give base=")
    refused(lambda: r.merge([one, other], base=base, name="m2"), "average reads no base; leave")
    refused(lambda: r.merge([one], name="m3"), "it has 1 model and needs two or more")
    refused(lambda: r.merge([], base=base, how="ties", name="m4"), "no models besides its base")
    refused(lambda: r.merge([one, one], name="m5"), "'on_whole' is given twice")
    refused(lambda: r.merge([one, sampled], name="m6"), r"models\[1\] = .* is not a model")
    weights = {"on_whole": 1.0, "nobody": 2.0}
    refused(lambda: r.merge([one, other], weights=weights, name="m7"), "'nobody' is not one of its")
    weights = {"on_whole": 0.0, "on_last": 0.0}
    refused(lambda: r.merge([one, other], weights=weights, name="m8"), "they add up to 0")
    r = build({"merged.weights": {"elsewhere": 1.0}})
    _, one, other = two(r)
    refused(lambda: r.merge([one, other]), "'elsewhere' is not one of its models")


def test_auxiliary_data_are_demonstrations_or_a_data_stage(build: Any) -> None:
    r = build({"sft.aux.ptx.weight": 0.25, "sft.aux.own": 1.0})
    base, one, _ = two(r)
    chosen = r.select(r.sample(one, prompts=r.prompts("whole")))
    aux = {"ptx": (r.demos(r.domains), Aux(0.5, batch_size=4)), "own": (chosen, 2.0)}
    expected = {"aux.ptx.whole": "whole", "aux.ptx.last": "last", "aux.own": "selection"}
    sft = r.sft(start=base, data=r.demos("last"), steps=5, aux=aux)
    found = edges(r, sft)
    assert found == {"start": "base", "domains.last": "last", **expected}
    config = r.graph(sft).nodes["sft"].config
    weights = {name: (loss["weight"], loss["batch_size"]) for name, loss in config["aux"].items()}
    assert weights == {"ptx": (0.25, 4), "own": (1.0, 32)}, "--set goes before the recipe"
    policy = r.rl(start=sft, prompts=r.prompts("last"), steps=5, aux=aux)
    assert expected.items() <= edges(r, policy).items()
    pairs = r.pairs(r.sample(policy, prompts=r.prompts("last"), name="more"))
    assert expected.items() <= edges(r, r.dpo(start=sft, data=pairs, steps=5, aux=aux)).items()
    student = r.distill(
        start=sft, teachers={"last": policy}, prompts=r.prompts("last"), steps=5, aux=aux
    )
    assert expected.items() <= edges(r, student).items()


def test_modes_of_auxiliary_demonstrations_are_settings(build: Any) -> None:
    r = build()
    base, one, _ = two(r)
    aux = {"ptx": (r.demos("last", mode="no_think"), 0.5)}
    sft = r.sft(start=base, data=r.demos("whole"), steps=5, aux=aux)
    assert r.graph(sft).nodes["sft"].config["aux"]["ptx"]["modes"] == ["no_think"]
    chosen = r.select(r.sample(one, prompts=r.prompts("whole")))
    refused(
        lambda: r.sft(
            start=base,
            data=r.demos("whole"),
            steps=5,
            aux={"own": (chosen, Aux(1.0, modes=("think",)))},
            name="s1",
        ),
        "the rows of 'own' are as its data stage made them",
    )


def test_auxiliary_losses_without_sense_are_refused_while_planning(build: Any) -> None:
    r = build()
    base, one, _ = two(r)
    sft = {"start": base, "data": r.demos("last"), "steps": 5}
    refused(lambda: r.sft(**sft, aux={"x": r.demos("last")}, name="s1"), "takes data and weight")
    refused(lambda: r.sft(**sft, aux={"a.b": (r.demos("last"), 1)}, name="s2"), "letters, digits")
    refused(lambda: r.sft(**sft, aux={"x": (one, 1.0)}, name="s3"), "its data is 'on_whole'")
    refused(lambda: r.sft(**sft, aux={"x": (r.demos("last"), -1.0)}, name="s4"), r"aux\.x")
    noisy = r.demos("last", noise=0.1)
    refused(lambda: r.sft(**sft, aux={"x": (noisy, 1.0)}, name="s5"), "noise = 0.1")
    refused(lambda: r.sft(**sft, aux_batch_size=4, name="s6"), "unknown option")
    r = build({"sft.aux": {"ptx": 1.0}})
    refused(lambda: r.sft(start=base, data=r.demos("last"), steps=5), "'ptx' has no data in the")


@pytest.mark.slow
def test_a_recipe_with_all_of_it_runs_to_its_end(tmp_path: Path, build: Any) -> None:
    """An average of two runs, PPO-ptx's shape on top of it with a moving average, a TIES merge."""
    r = build()
    base, one, other = two(r)
    mean = r.merge({"a": one, "b": other}, name="mean")
    policy = r.rl(
        start=mean,
        prompts=r.prompts(r.domains),
        aux={"ptx": (r.demos(r.domains), 0.5)},
        optimizer=AdamW(ema=0.5),
        trainable=["*.mlp.*"],
        steps=3,
        prompts_per_step=8,
        group_size=4,
        max_new_tokens=4,
        **FAST,
    )
    last = r.merge([policy, one], base=base, how="ties", name="last_merge")
    graph = r.graph(r.evaluate(last, init=mean, num_problems=5, samples=1, bootstrap=100))
    store = Store(tmp_path / "store")
    events = list(run(graph, store, execute=EXECUTE, preload=PRELOAD))
    assert not [event for event in events if event.kind == "failed"]
    found: dict[str, Artifact] = {artifact.name: artifact for artifact in store.list()}
    inputs = {edge: source["name"] for edge, source in found["rl"].inputs.items()}
    assert inputs == {
        "start": "mean",
        **{f"domains.{d}": d for d in ("whole", "last")},
        **{f"aux.ptx.{d}": d for d in ("whole", "last")},
    }
    assert found["mean"].metrics["models"] == 2
    lines = (found["rl"].path / "metrics.jsonl").read_text().splitlines()
    assert any("aux/ptx" in json.loads(line) for line in lines)
    ancestors = {a.record["name"] for a in ancestry.lineage(store, found["evaluation"])}
    assert {"mean", "on_whole", "on_last", "rl", "last_merge", "base"} <= ancestors


def test_planning_them_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; import posttrain.recipe, posttrain.stages.config; "
        "sys.exit(bool({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
