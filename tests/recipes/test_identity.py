"""What identifies a stage: its settings without those at their default, within choices too; and
--set, which reaches into a choice by dotted path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import Graph
from posttrain.engine.planner import plan
from posttrain.engine.store import Store
from posttrain.recipe import Recipe
from posttrain.stages.config import build_config
from posttrain.stages.kinds import kind_of
from posttrain.suites.load import load_suite

MODULE = """
from typing import Annotated, Literal
from pydantic import Field
from posttrain.stages.kinds import Kind
from posttrain.values import ByKind, Settings, changing

class Clip(Settings):
    kind: Literal["clip"] = "clip"
    low: float = 0.2
    high: float = changing(0.2)

class Cispo(Settings):
    kind: Literal["cispo"] = "cispo"
    high: float = changing(4.0)
    # more settings

class Penalty(Settings):
    coef: float = 0.02

class Learning(Settings):
    steps: int = 10
    surrogate: Annotated[Clip | Cispo, Field(discriminator="kind"), ByKind] = Clip()
    penalty: Penalty | None = None
    by_domain: dict[str, Annotated[Clip | Cispo, Field(discriminator="kind")]] = {}
    weights: dict[str, float] = {"a": 1.0}
    # more of all

LEARN = Kind(name="choices.LEARN", settings="choices:Learning", run="loop:run", makes=("model",))
"""
LEARN = "choices.LEARN"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Its kind can be imported; called with lines, a setting more is in Learning and in Cispo."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "loop.py").write_text("def run(config, ctx): return {}")

    def write(line: str) -> None:
        text = MODULE.replace("# more settings", line).replace("# more of all", line)
        # A compiled copy may be as old as the file, to the second.
        sys.modules.pop("choices", None)
        (tmp_path / "choices.py").write_text(text + "\n" * len(sys.modules))
        for compiled in tmp_path.glob("__pycache__/choices*"):
            compiled.unlink()

    write("")
    yield write
    sys.modules.pop("choices", None)


def learn(overrides: dict[str, Any] | None = None, **settings: Any) -> Graph:
    suite, directory = load_suite("core")
    r = Recipe(suite, directory, overrides=overrides)
    return r.graph(r.stage_of_kind(kind_of(LEARN), inputs={}, name="learn", **settings))


def fingerprint(*arguments: Any, **settings: Any) -> str:
    return learn(*arguments, **settings).fingerprints()["learn"]


CISPO = {"surrogate": {"kind": "cispo"}, "by_domain": {"math": {"kind": "cispo", "high": 3}}}


@pytest.mark.parametrize("settings", [{}, CISPO, {"steps": 3, "penalty": {}}], ids=str)
def test_a_setting_that_is_added_later_changes_no_fingerprint(
    settings: dict[str, Any], module: Callable[[str], None]
) -> None:
    before = fingerprint(**settings)
    module("added: int = 7")
    graph = learn(**settings)
    assert graph.nodes["learn"].config["added"] == 7
    assert graph.fingerprints()["learn"] == before
    assert fingerprint(**settings, added=8) != before


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"steps": 10}, {}),
        ({"surrogate": "clip"}, {}),
        ({"surrogate": {"kind": "clip", "high": 0.2}}, {}),
        ({"surrogate": {"kind": "cispo", "high": 4}}, {"surrogate": "cispo"}),
        ({"penalty": {"coef": 0.02}}, {"penalty": {}}),
        (
            {"by_domain": {"m": {"kind": "cispo", "high": 4}}},
            {"by_domain": {"m": {"kind": "cispo"}}},
        ),
        ({"weights": {"a": 1}}, {}),
    ],
)
def test_a_default_may_be_written_or_left_out(given: dict[str, Any], same: dict[str, Any]) -> None:
    assert fingerprint(**given) == fingerprint(**same)


def test_what_differs_from_a_default_is_identity() -> None:
    found = [
        build_config(LEARN, "learn", settings).to_json(defaults=False)
        for settings in (
            {},
            {"surrogate": "cispo"},
            {"surrogate": {"kind": "clip", "low": 0.1}},
            {"penalty": {}},
            {"by_domain": {"m": {"kind": "clip"}}, "steps": 3},
            {"weights": {}},
        )
    ]
    assert found == [
        {},
        {"surrogate": {"kind": "cispo"}},
        {"surrogate": {"kind": "clip", "low": 0.1}},
        {"penalty": {}},
        {"by_domain": {"m": {"kind": "clip"}}, "steps": 3},
        {"weights": {}},
    ]


@pytest.mark.parametrize("settings", [{}, CISPO, {"penalty": {"coef": 1}, "weights": {}}], ids=str)
def test_the_whole_settings_make_the_same_again(settings: dict[str, Any]) -> None:
    built = build_config(LEARN, "learn", settings)
    again = build_config(LEARN, "learn", built.to_json())
    assert again == built
    assert again.to_json() == built.to_json()
    assert build_config(LEARN, "learn", built.to_json(defaults=False)) == built


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        ({"learn.surrogate.high": 0.28}, {"surrogate": {"kind": "clip", "high": 0.28}}),
        ({"l*.surrogate.high": 0.28}, {"surrogate": {"kind": "clip", "high": 0.28}}),
        ({"learn.surrogate": "cispo"}, {"surrogate": {"kind": "cispo"}}),
        ({"learn.surrogate.kind": "cispo"}, {"surrogate": {"kind": "cispo"}}),
        (
            {"learn.surrogate.high": 3, "learn.surrogate.kind": "cispo"},
            {"surrogate": {"kind": "cispo", "high": 3}},
        ),
        (
            {"learn.surrogate.high": 3, "learn.surrogate": "cispo"},
            {"surrogate": {"kind": "cispo", "high": 3}},
        ),
        ({"learn.penalty.coef": 0.5}, {"penalty": {"coef": 0.5}}),
        ({"learn.weights.b": 2}, {"weights": {"a": 1.0, "b": 2.0}}),
        ({"learn.by_domain.math.kind": "clip"}, {"by_domain": {"math": {"kind": "clip"}}}),
    ],
    ids=str,
)
def test_a_setting_is_reached_by_its_path(overrides: dict[str, Any], given: dict[str, Any]) -> None:
    changed = learn(overrides)
    assert changed.payload("learn") == learn(**given).payload("learn")


def test_what_the_recipe_says_of_a_choice_stays() -> None:
    choice = kind_of(LEARN).settings_class().model_fields["surrogate"].default
    graph = learn({"learn.surrogate.high": 0.3}, surrogate=type(choice)(low=0.1))
    assert graph.payload("learn")["config"] == {
        "surrogate": {"kind": "clip", "low": 0.1, "high": 0.3}
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"learn.surrogate.hihg": 1},
            "field 'surrogate.hihg': unknown option; did you mean 'high'? choices: high, low",
        ),
        (
            {"learn.surrogate": "cipso"},
            "field 'surrogate': there is no 'cipso'; did you mean 'cispo'? choices: cispo, clip",
        ),
        (
            {"learn.by_domain.math.high": 1},
            "field 'by_domain.math': {'high': 1} does not say its kind; choices: clip, cispo",
        ),
        ({"learn.surrogate.high": True}, "field 'surrogate.high': True is no number"),
        (
            {"learn.surrogate.high": "3"},
            "field 'surrogate.high': '3' is no number; write 3.0 without quotes",
        ),
        ({"learn.steps.few": 1}, "--set learn.steps.few: 10 has no part 'few'; set the whole"),
        (
            {"learn.surrgate.high": 1},
            "field 'surrgate': unknown option; did you mean 'surrogate'?",
        ),
        (
            {"l*.surrgate.high": 1},
            "none of the stages learn has a setting 'surrgate'; did you mean 'surrogate'?",
        ),
        ({"lern.surrogate.high": 1}, "has that name; did you mean 'learn'? stages: learn"),
    ],
    ids=str,
)
def test_a_path_that_leads_nowhere_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        learn(overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ({}, {"steps": 12}, "steps: 10 -> 12"),
        ({"steps": 12}, {}, "steps: 12 -> 10"),
        ({}, {"surrogate": {"kind": "clip", "high": 0.28}}, "surrogate.high: 0.2 -> 0.28"),
        ({"surrogate": {"kind": "clip", "high": 0.28}}, {}, "surrogate.high: 0.28 -> 0.2"),
        (
            {"surrogate": {"kind": "clip", "low": 0.1}},
            {"surrogate": {"kind": "clip", "high": 0.28}},
            "surrogate.high: 0.2 -> 0.28; surrogate.low: 0.1 -> 0.2",
        ),
        ({}, {"surrogate": "cispo"}, 'surrogate.kind: "clip" -> "cispo"'),
        ({}, {"penalty": {"coef": 0.5}}, 'penalty: null -> {"coef": 0.5}'),
        ({}, {"weights": {"a": 1, "b": 2}}, "weights.b: (absent) -> 2.0"),
    ],
    ids=str,
)
def test_the_plan_names_what_changed_with_the_values_of_defaults(
    old: dict[str, Any], new: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    graph = learn(**old)
    work = store.begin(graph.fingerprints()["learn"])
    assert work is not None
    store.commit(graph.nodes["learn"], work, inputs={}, metrics={}, provenance={})
    (row,) = plan(learn(**new), store)
    assert row.reason == reason
