"""r.extend: more training of a stage, from where it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain.algorithms import KL, SimPO
from posttrain.engine.errors import ConfigError
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def base(r: Recipe) -> Stage:
    return r.pretrain(data=r.demos(r.domains), steps=5)


def node(r: Recipe, target: Stage) -> Any:
    return r.graph(target).nodes[target.name]


def test_it_is_the_same_stage_from_its_end(make_recipe: MakeRecipe) -> None:
    r = make_recipe()
    start = base(r)
    first = r.rl(
        start=start,
        prompts=r.prompts("add", mode=None),
        aux={"ptx": (r.demos("sort"), 0.5)},
        steps=7,
        group_size=4,
        kl=KL(0.1),
        name="first",
    )
    more = r.extend(first, steps=3, lr=1e-3)
    old, new = node(r, first), node(r, more)
    assert (more.name, more.kind, more.domains) == ("first_more", "rl", first.domains)
    assert new.inputs == old.inputs | {"start": "first"}
    changed = {k for k in new.config if new.config[k] != old.config[k]}
    assert changed == {"steps", "lr", "seed"}
    assert (new.config["steps"], new.config["lr"]) == (3, 1e-3)
    again = r.extend(more, steps=3, name="again")
    seeds = {node(r, s).config["seed"] for s in (first, more, again)}
    assert len(seeds) == 3
    assert node(r, r.extend(first, steps=3, name="own", seed=5)).config["seed"] == 5


def test_routes_stay_and_self_is_who_it_was(make_recipe: MakeRecipe) -> None:
    r = make_recipe()
    start = base(r)
    teacher = r.sft(start=start, data=r.demos("add"), epochs=1, name="teacher")
    student = r.distill(
        start=start,
        teachers={"add": teacher, "sort": "self"},
        prompts=r.prompts(["add", "sort"]),
        steps=5,
    )
    more = node(r, r.extend(student, steps=2))
    old = node(r, student)
    assert more.config["routes"] == old.config["routes"]
    assert more.inputs == old.inputs | {"start": "student"}
    assert "base" in more.inputs.values()
    # In steps, also where the stage was so many passes long.
    longer = node(r, r.extend(teacher, steps=4))
    assert (longer.config["steps"], longer.config["epochs"]) == (4, None)


@pytest.mark.parametrize(("loss", "reference"), [("dpo", "base"), (SimPO(), None)])
def test_the_reference_of_dpo_stays_its_start(
    make_recipe: MakeRecipe, loss: Any, reference: str | None
) -> None:
    r = make_recipe()
    start = base(r)
    pairs = r.pairs(r.sample(start, prompts=r.prompts("add"), k=4))
    first = r.dpo(start=start, data=pairs, steps=5, loss=loss)
    assert node(r, r.extend(first, steps=5)).inputs.get("reference") == reference


def test_a_reward_model_goes_on(make_recipe: MakeRecipe) -> None:
    r = make_recipe()
    start = base(r)
    pairs = r.pairs(r.sample(start, prompts=r.prompts("add"), k=4))
    first = r.reward_model(start=start, data=pairs, steps=5)
    more = node(r, r.extend(first, steps=3))
    assert more.inputs == node(r, first).inputs | {"start": "reward_model"}
    assert more.config["steps"] == 3


def test_overrides_reach_it_by_its_name(make_recipe: MakeRecipe) -> None:
    r = make_recipe(overrides={"sft.lr": 0.5, "sft_more.batch_size": 3})
    first = r.sft(start=base(r), data=r.demos("add"), steps=5)
    config = node(r, r.extend(first, steps=5)).config
    assert (config["lr"], config["batch_size"]) == (0.5, 3)


def test_what_cannot_be_extended(make_recipe: MakeRecipe) -> None:
    r = make_recipe()
    start = base(r)
    rollouts = r.sample(start, prompts=r.prompts("add"))
    for stage, problem in (
        (start, r"takes a stage of kind .*sft.*; go on from it with r.sft"),
        (rollouts, r"'rollouts' \(sample\) has no start"),
        ("sft", "r.extend: 'sft' cannot be extended"),
        (r.stage("later"), "stands further down"),
    ):
        with pytest.raises(ConfigError, match=problem):
            r.extend(stage, steps=5)  # type: ignore[arg-type]
    tuned = r.sft(start=start, data=r.demos("add"), steps=5)
    with pytest.raises(ConfigError, match="learning_rate"):
        r.extend(tuned, steps=5, learning_rate=1e-3)


def test_it_learns_from_there(
    make_recipe: MakeRecipe, execute: Callable[[Recipe, Stage], dict[str, Any]]
) -> None:
    r = make_recipe()
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "head_dim": 16}
    start = r.pretrain(data=r.demos("add"), steps=2, batch_size=4, **small)
    first = r.sft(start=start, data=r.demos("add"), steps=2, batch_size=4, lr=0.01)
    made = execute(r, r.extend(first, steps=2, lr=1e-9))
    ours, theirs = (
        load_file(made[name].path / "model.safetensors") for name in ("sft_more", "sft")
    )
    before = load_file(made["base"].path / "model.safetensors")
    # At next to no learning rate it stays where the first one ended, far from the start of that.
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert any(not torch.allclose(ours[name], before[name], atol=1e-3) for name in ours)
