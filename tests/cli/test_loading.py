"""Recipes found, read and run; settings as values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.store import Store
from posttrain.language.loader import Loaded, describe, find_recipe, load_recipe, shipped_recipes


@pytest.fixture
def load(place: Path) -> Callable[..., Loaded]:
    def load(*settings: str, recipe: str = "mini.py", **options: Any) -> Loaded:
        options = {"suite": "pairs.toml"} | options
        return load_recipe(recipe, store=Store(place / "store"), settings=settings, **options)

    return load


def test_a_recipe_by_path_and_by_name(load: Callable[..., Loaded], place: Path) -> None:
    mine = load()
    assert (mine.name, mine.path, mine.suite, mine.seed) == (
        "mini",
        place / "mini.py",
        "pairs.toml",
        0,
    )
    assert mine.graph.target == "evaluation"
    shipped = load(recipe="mopd", suite=None)
    assert (shipped.name, shipped.suite) == ("mopd", "core")
    assert find_recipe("mopd") == shipped_recipes()["mopd"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_say_what_they_are(name: str) -> None:
    description = describe(shipped_recipes()[name])
    assert description.summary.endswith(".")
    assert description.source


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps=3", 3),
        ("steps=3.0", 3),
        ("lr=1", 1.0),
        ("lr=2e-3", 0.002),
        ("cards=False", False),
        ("cards=true", True),
        ("size=smaller", "smaller"),
        ("base=null", None),
    ],
)
def test_parameters_get_values_of_their_type(
    load: Callable[..., Loaded], setting: str, value: object
) -> None:
    found = load(setting).settings[setting.partition("=")[0]]
    assert found == value
    assert type(found) is type(value)


def test_a_text_parameter_stays_text(load: Callable[..., Loaded], place: Path) -> None:
    (place / "text.py").write_text(
        "def recipe(r, tag: str = '', n: 'int' = 0, free=None, rows: list[int] = []):\n"
        "    assert (tag, n, free, rows) == ('7', 2, {'a': 1}, [1]), (tag, n, free, rows)\n"
        "    return r.pretrain(data=r.demos(r.domains), steps=1)\n"
    )
    settings = ("tag=7", "n=2", 'free={"a": 1}', "rows=[1]")
    assert load(*settings, recipe="text.py").graph.target == "base"


def test_settings_reach_the_stages(load: Callable[..., Loaded]) -> None:
    graph = load("steps=5", "*_teacher.lr=0.5", "student.lr=0.1", "student.lr=0.2", "seed=4").graph
    config = {name: graph.nodes[name].config for name in graph.order()}
    assert config["sft"]["steps"] == 5
    assert config["sums_teacher"]["lr"] == config["copies_teacher"]["lr"] == 0.5
    assert config["student"]["lr"] == 0.2
    assert {c["seed"] for c in config.values() if "seed" in c} == {4}


def test_the_suite_may_be_a_setting(load: Callable[..., Loaded]) -> None:
    assert load("suite=pairs.toml", suite=None).suite == "pairs.toml"


def test_an_edited_recipe_is_read_again(load: Callable[..., Loaded], place: Path) -> None:
    path = place / "mini.py"
    before = load().graph.nodes["sft"].config["steps"]
    path.write_text(path.read_text().replace("steps: int = 2", "steps: int = 7"))
    after = load().graph.nodes["sft"].config["steps"]
    assert (before, after) == (2, 7)
    assert not (place / "__pycache__").exists()


def test_a_recipe_imports_what_lies_beside_it(load: Callable[..., Loaded], place: Path) -> None:
    (place / "lengths_of_mine.py").write_text("STEPS = 9\n")
    (place / "mine.py").write_text(
        "from lengths_of_mine import STEPS\n"
        "def recipe(r):\n"
        "    return r.pretrain(data=r.demos(r.domains), steps=STEPS)\n"
    )
    loaded = load(recipe="mine.py")
    assert loaded.graph.nodes["base"].config["steps"] == 9
    assert place in loaded.sources


def test_the_file_of_a_users_mistake_is_named(load: Callable[..., Loaded], place: Path) -> None:
    (place / "bad.py").write_text(
        "def recipe(r):\n    return r.pretrain(data=r.demos('sums'), steps=0)\n"
    )
    with pytest.raises(ValueError, match="'steps'") as caught:
        load(recipe="bad.py")
    (note,) = caught.value.__notes__
    assert note.startswith(f"in {place / 'bad.py'}, line 2")
