"""Schedules as a recipe gives them: shown in the documentation, by entry, and from outside."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import schedules
from posttrain.engine.errors import ConfigError
from posttrain.recipe import Recipe
from posttrain.suites.load import load_suite

PAGE = Path(__file__).resolve().parents[2] / "docs" / "language.md"
LINE = schedules.linear(1.0, 0.0)


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """A recipe on the core suite, with settings from outside."""
    suite, directory = load_suite("core")

    def make(**overrides: Any) -> Recipe:
        return Recipe(suite, directory, overrides=overrides)

    return make


def sft(r: Recipe, **settings: Any) -> dict[str, Any]:
    """The settings of an sft stage on all domains."""
    base = r.base("tiny")
    stage = r.sft(start=base, data=r.demos(r.domains), steps=9, **settings)
    return dict(r.graph(stage).nodes["sft"].config)


def test_the_recipe_that_is_shown_can_be_planned(recipe: Callable[..., Recipe]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    shown: dict[str, Any] = {}
    exec(next(block for block in blocks if "fading" in block), shown)
    r = recipe()
    config = r.graph(shown["recipe"](r)).nodes["sft"].config
    first = r.domains[0]
    assert config["batch_size"]["schedule"] == "steps"
    assert config["domain_shares"][first]["schedule"] == "linear"
    assert config["aux"]["before"]["weight"]["schedule"] == "cosine"
    assert all(config["domain_shares"][name] == 1.0 for name in r.domains[1:])


def test_a_weight_from_outside_takes_the_place_of_a_schedule(
    recipe: Callable[..., Recipe],
) -> None:
    for key in ("sft.aux.ptx", "sft.aux.ptx.weight"):
        plain = recipe(**{key: 0.25})
        given = sft(plain, aux={"ptx": (plain.demos(plain.domains), LINE)})
        assert given["aux"]["ptx"]["weight"] == 0.25
        scheduled = recipe(**{key: LINE})
        given = sft(scheduled, aux={"ptx": (scheduled.demos(scheduled.domains), 0.25)})
        assert given["aux"]["ptx"]["weight"] == LINE.model_dump(mode="json")


def test_a_loss_without_data_cannot_have_a_schedule(recipe: Callable[..., Recipe]) -> None:
    r = recipe(**{"sft.aux": {"ptx": LINE, "more": LINE}})
    with pytest.raises(ConfigError, match="'more' has no data in the recipe; choices: ptx"):
        sft(r, aux={"ptx": (r.demos(r.domains), 0.25)})


def test_shares_name_the_domains_of_the_stage(recipe: Callable[..., Recipe]) -> None:
    even = dict.fromkeys(recipe().domains, 1.0)
    first, *others = even
    with pytest.raises(ConfigError, match=r"\(sft\), field 'domain_shares': 'x' is not one of"):
        sft(recipe(), domain_shares=even | {"x": LINE})
    late = schedules.steps({0: even, 3: dict.fromkeys(others, 1.0)})
    with pytest.raises(ConfigError, match=f"no share to domain '{first}'; write '{first}': 0"):
        sft(recipe(), domain_shares=late)
    r = recipe()
    with pytest.raises(ConfigError, match=r"\(distill\), field 'domain_shares': 'x' is not one"):
        r.distill(
            start=r.base("tiny"),
            teachers=dict.fromkeys(r.domains, "self"),
            prompts=r.prompts(r.domains),
            steps=3,
            domain_shares=even | {"x": 1},
        )
