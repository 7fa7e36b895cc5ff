"""A recipe that renames its stages: the store is shown under the names of the newest run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def renamed(cli: Callable[..., Any], done: Path) -> Path:
    """The tiny recipe with another name for one stage, run where all is cached."""
    recipe = done / "renamed.py"
    text = (done / "mini.py").read_text()
    recipe.write_text(text.replace("lr=lr)", 'lr=lr, name="general")'))
    ran = cli("run", "renamed.py", "--suite", "pairs.toml", "--json", "--no-report").json
    assert {stage["status"] for stage in ran["stages"]} == {"cached"}
    return done


def test_commands_show_the_names_of_the_newest_run(cli: Callable[..., Any], renamed: Path) -> None:
    listed = {a["name"] for a in cli("ls", "--json").json["artifacts"]}
    assert "general" in listed and "sft" not in listed
    assert "general" in cli("ls").out
    said = cli("show", "general").out
    assert said.startswith("general  sft") and "called sft before" in said
    assert cli("show", "sft").out == said
    assert "general-" in cli("show", "student").out
    tree = cli("lineage", "evaluation").out
    assert "start: general" in tree and "start: sft" not in tree
    network = cli("lineage", "evaluation", "--json").json
    labels = {node["label"] for node in network["nodes"]}
    assert {edge["from"] for edge in network["edges"]} <= labels
    assert "general" in cli("diff", "general", "student").out
    shown = cli("show", "sft", "--json").json
    assert (shown["name"], shown["names"]) == ("sft", ["sft", "general"])
    assert cli("verify").code == 0
    cli("report", "student")
    page = (renamed / "report.html").read_text()
    assert "<title>general-" in page and "<title>sft-" not in page


def test_the_old_recipe_takes_its_names_back(cli: Callable[..., Any], renamed: Path) -> None:
    cli("run", "mini.py", "--suite", "pairs.toml", "--no-report")
    assert cli("show", "general").out.startswith("sft  sft")


def test_a_plan_changes_no_name(cli: Callable[..., Any], done: Path) -> None:
    recipe = done / "renamed.py"
    recipe.write_text((done / "mini.py").read_text().replace("lr=lr)", 'lr=lr, name="general")'))
    cli("plan", "renamed.py", "--suite", "pairs.toml")
    assert not (done / "posttrain-store" / "names.json").exists()


def test_what_is_called_otherwise_now_is_not_old(cli: Callable[..., Any], renamed: Path) -> None:
    """A newer artifact of the first name does not make the renamed one superfluous."""
    cli("run", "mini.py", "--suite", "pairs.toml", "--no-report", "--set", "sft.lr=0.02")
    names = json.loads((renamed / "posttrain-store" / "names.json").read_text())["names"]
    (fingerprint,) = [fp for fp, given in names.items() if given == ["sft", "general"]]
    going = cli("gc", "--dry-run", "--json").json["removed"]
    assert f"sft-{fingerprint[:12]}" not in [item["label"] for item in going]
