"""Warnings: of the recipe, of stages that ran, of those in the store and of those that failed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import weights_file

OWN = """
from posttrain.stages.kinds import Kind
from posttrain.values import Settings

WARY = Kind(name="wary.WARY", settings="wary:Wary", run="wary:run", makes=("model",))


class Wary(Settings):
    fails: bool = False


def run(settings, ctx):
    ctx.warn("only 1 of 9 rows is kept; lower min_reward")
    if settings.fails:
        raise RuntimeError("it broke")
    return {}


def recipe(r, fails: bool = False):
    r.stage_of_kind(WARY, inputs={"prompts": r.prompts("copies")}, name="left")
    return r.stage_of_kind(WARY, inputs={"p": r.prompts("sums")}, name="made", fails=fails)
"""
WARY = ("wary.py", "--suite", "pairs.toml")
LEFT = {
    "stage": None,
    "text": "stage left is not made: 'made', which recipe() returns, is not made from it; leave "
    "out what is not needed, or hand it to a stage that is",
}
KEPT = {"stage": "made", "text": "only 1 of 9 rows is kept; lower min_reward"}


@pytest.fixture(autouse=True)
def beside(place: Path) -> Iterator[None]:
    (place / "wary.py").write_text(OWN)
    yield
    sys.modules.pop("wary", None)


def test_they_stay_with_what_was_made(cli: Callable[..., Any]) -> None:
    assert cli("plan", *WARY, "--json").json["warnings"] == [LEFT]
    assert "recipe  stage left is not made" in cli("plan", *WARY).out
    # It runs, then it is cached, then the plan tells of it.
    for command in ("run", "run", "plan"):
        assert cli(command, *WARY, "--json").json["warnings"] == [LEFT, KEPT]
    said = cli("run", *WARY).out
    assert "2 warnings" in said and f"made    {KEPT['text']}" in said
    assert KEPT["text"] in cli("show", "made").out
    page = Path("report.html").read_text()
    assert KEPT["text"] in page and "stage left is not made" in page


def test_of_a_stage_that_fails_too(cli: Callable[..., Any]) -> None:
    result = cli("run", *WARY, "--set", "fails=true")
    assert result.code == 1
    assert f"made    {KEPT['text']}" in result.out


def test_of_a_verifier_that_tells_nothing_apart(cli: Callable[..., Any], place: Path) -> None:
    (place / "grade.py").write_text("def score(response, problem):\n    return 0.5\n")
    suite = place / "pairs.toml"
    suite.write_text(suite.read_text().replace('"exact"', '"python:grade.py:score"', 1))
    told = cli("run", *WARY, "--json").json["warnings"]
    (one,) = [warning for warning in told if warning["stage"] == "sums"]
    assert one["text"].startswith("its verifier gives 0.5 to right and to wrong responses alike")


def test_every_stage_of_a_recipe_without_leftovers_is_needed(cli: Callable[..., Any]) -> None:
    assert cli("plan", "mini.py", "--suite", "pairs.toml", "--json").json["warnings"] == []


@pytest.mark.parametrize("where", [None, "chat_template.jinja", "tokenizer_config.json"])
def test_of_a_start_without_chat_template(
    cli: Callable[..., Any], place: Path, where: str | None
) -> None:
    outside = place / "outside"
    outside.mkdir()
    (outside / "config.json").write_text('{"model_type": "qwen2"}')
    tensors = {"model.norm.weight": ("F32", (2,))}
    (outside / "model.safetensors").write_bytes(weights_file(tensors))
    (outside / "tokenizer.json").write_text("{}")
    texts = {"chat_template.jinja": "{{ 1 }}", "tokenizer_config.json": '{"chat_template": "x"}'}
    if where is not None:
        (outside / where).write_text(texts[where])
    found = cli("plan", "mini.py", "--suite", "pairs.toml", "--set", "base=outside", "--json")
    told = [w for w in found.json["warnings"] if w["stage"] == "base"]
    assert len(told) == (where is None)
    if told:
        assert told[0]["text"].startswith(f"{outside} has no chat template: prompts are plain text")
