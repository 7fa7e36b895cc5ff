"""Hard cases of the recipe language: what an rl stage draws changes while it runs.

Each builds the recipe, runs it on a tiny model, and looks at its lineage and at what was drawn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import judges, schedules
from posttrain.algorithms import Gaussian, Reprofile
from posttrain.engine.errors import ConfigError
from posttrain.engine.record import Artifact
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe
from posttrain.suites.domain import Suite

RL = {"prompts_per_step": 6, "group_size": 4, "max_new_tokens": 4, "lr": 1e-3, "warmup_steps": 1}


@pytest.fixture
def recipe(tmp_path: Path, make_suite: Callable[[str, str], Suite]) -> Callable[..., Recipe]:
    """A builder over two domains, with what `--set` gives."""
    mine = make_suite("reasoning", "general")
    return lambda **overrides: Recipe(mine, tmp_path, overrides=overrides)


def edges(artifact: Artifact) -> dict[str, str]:
    return {edge: source["name"] for edge, source in artifact.inputs.items()}


def read(artifact: Artifact, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.path / file).open(encoding="utf-8")]


def start(r: Recipe) -> Stage:
    """A model that solves some of the problems."""
    return r.pretrain(data=r.demos(r.domains), steps=60, lr=5e-3, batch_size=64)


@pytest.mark.slow
def test_the_mix_of_prompts_and_the_reward_change_within_a_stage(
    recipe: Callable[..., Recipe], execute: Callable[..., dict[str, Artifact]]
) -> None:
    """Case 11, DeepSeek-R1's last stage: general prompts and the preference reward only in its last
    part. What a response scores until then is the verifier's reward."""
    r = recipe()
    base, prompts = start(r), r.prompts(r.domains)
    liked = r.reward_model(
        start=base,
        data=r.pairs(r.sample(base, prompts=prompts, k=8, max_new_tokens=4)),
        steps=5,
        lr=1e-3,
        batch_size=16,
    )
    late = judges.verifier() + schedules.steps({0: 0.0, 3: 0.5}) * judges.scalar(liked)
    mix = schedules.steps({0: {"reasoning": 1, "general": 0}, 3: {"reasoning": 1, "general": 1}})
    policy = r.rl(start=base, prompts=prompts, reward=late, steps=5, domain_shares=mix, **RL)
    found = execute(r, policy)["rl"]
    assert edges(found) == {
        "start": "base",
        "judges.reward_model": "reward_model",
        "domains.reasoning": "reasoning",
        "domains.general": "general",
    }
    rows = read(found, "rollouts.jsonl")
    assert all(row["score"] == row["reward"] for row in rows if row["step"] < 3)
    assert any(row["score"] != row["reward"] for row in rows if row["step"] >= 3)
    drawn = Counter((row["step"], row["domain"]) for row in rows)
    assert drawn == {(step, "reasoning"): 24 for step in range(3)} | {
        (step, domain): 12 for step in (3, 4) for domain in ("reasoning", "general")
    }
    given = [line["setting/domain_shares/general"] for line in read(found, "metrics.jsonl")]
    assert given == [0, 0, 0, 1, 1]


@pytest.mark.slow
def test_a_curriculum_is_profiled_anew_at_a_plateau(
    recipe: Callable[..., Recipe], execute: Callable[..., dict[str, Artifact]]
) -> None:
    """Case 12, Nemotron 3 Nano: a Gaussian of pass rates that moves from easy to hard within each
    domain, at fixed shares of the domains; the profile is made anew where the reward stands."""
    r = recipe()
    base, prompts = start(r), r.prompts(r.domains)
    policy = r.rl(
        start=base,
        prompts=prompts,
        profile=r.profile(base, prompts=prompts, n=4, max_new_tokens=4),
        steps=6,
        draw=Gaussian(
            schedules.linear(0.9, 0.3),
            spread=0.1,
            reprofile=Reprofile(on_plateau=1, samples=4, prompts=20),
        ),
        domain_shares={"reasoning": 2, "general": 1},
        **RL,
    )
    made = execute(r, policy)
    found = made["rl"]
    assert edges(found) == {
        "start": "base",
        "profile": "profile",
        "domains.reasoning": "reasoning",
        "domains.general": "general",
    }
    assert edges(made["profile"])["model"] == "base"
    lines = read(found, "metrics.jsonl")
    anew = [step for step, line in enumerate(lines) if line["profiled"]]
    assert anew, "a reward of six steps falls once at least"
    first = anew[0]
    assert lines[first - 1]["reward"] - lines[first - 2]["reward"] < 0.01
    rows = read(found, f"profile-{first}.jsonl")
    assert Counter(row["domain"] for row in rows) == {"reasoning": 20, "general": 20}
    drawn = Counter((row["step"], row["domain"]) for row in read(found, "rollouts.jsonl"))
    assert drawn == {
        (step, domain): rows
        for step in range(6)
        for domain, rows in (("reasoning", 16), ("general", 8))
    }
    assert lines[0]["known_rate"] > lines[-1]["known_rate"], "from easy to hard"


def test_what_does_not_fit_is_told_when_the_recipe_is_built(
    recipe: Callable[..., Recipe],
) -> None:
    def build(message: str, prompts: str | None = None, **settings: Any) -> None:
        r = recipe()
        base = start(r)
        if settings.get("profile") == "of reasoning":
            settings["profile"] = r.profile(base, prompts=r.prompts("reasoning"))
        elif settings.get("profile") == "a model":
            settings["profile"] = base
        with pytest.raises(ConfigError, match=message):
            r.rl(start=base, prompts=r.prompts(prompts or r.domains), steps=5, **settings)

    build("'generl' is not one of the domains", domain_shares={"generl": 1})
    late = schedules.steps({0: {"reasoning": 1, "general": 1}, 3: {"math": 1}})
    build("'math' is not one of the domains", domain_shares=late)
    build("write 'general': 0 to leave it out", domain_shares={"reasoning": 1})
    build("give profile=r.profile", draw="band")
    build("not read with draw = in_turn", "reasoning", profile="of reasoning")
    build("is no profile", draw="band", profile="a model")
    build("has no problem of domain 'general'", draw="band", profile="of reasoning")


def test_shares_can_be_set_from_outside(recipe: Callable[..., Recipe]) -> None:
    r = recipe(**{"rl.domain_shares": {"reasoning": 1, "nowhere": 1}})
    with pytest.raises(ConfigError, match="'nowhere' is not one of the domains"):
        r.rl(start=start(r), prompts=r.prompts(r.domains), steps=5)
