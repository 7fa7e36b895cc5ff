"""A kind of stage from a module of the user: in plan, run, report and model card like any other."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

OWN = ("own_kind.py", "--suite", "pairs.toml")


@pytest.fixture(autouse=True)
def beside(place: Path) -> Iterator[None]:
    """The module in the current directory, not imported before and forgotten afterwards."""
    shutil.copy(Path(__file__).with_name("own_kind.py"), place / "own_kind.py")
    yield
    sys.modules.pop("own_kind", None)


def actions(plan: Any) -> dict[str, str]:
    return {stage["name"]: stage["action"] for stage in plan.json["stages"]}


def test_it_is_planned_run_reported_and_has_a_card(cli: Callable[..., Any]) -> None:
    plan = cli("plan", *OWN, "--json")
    kinds = {stage["name"]: stage["kind"] for stage in plan.json["stages"]}
    assert kinds["first"] == kinds["second"] == "own_kind.ECHO"

    run = cli("run", *OWN, "--set", "second.loss=0.25", "--json")
    made = {stage["name"]: stage["artifact"] for stage in run.json["stages"]}
    assert len((Path(made["first"]) / "echo.txt").read_text().splitlines()) == 2
    card = (Path(made["second"]) / "README.md").read_text()
    assert "Made by posttrain: an echo of its problems." in card
    assert "| calls | 2 |" in card and "| loss | 0.25 |" in card
    assert "| loudness | 0.562 |" in card

    page = Path("report.html").read_text()
    assert re.search(r"<h\d[^>]*>Echoes</h\d>", page)
    assert "how loud it still is" in page
    assert "loudness 0.562" in page

    # Its code is part of its identity.
    assert actions(cli("plan", *OWN, "--set", "second.loss=0.25", "--json")) == dict.fromkeys(
        kinds, "cached"
    )
    module = Path("own_kind.py")
    module.write_text(module.read_text() + "\n# another loop\n")
    changed = actions(cli("plan", *OWN, "--json"))
    assert (changed["sums"], changed["first"], changed["second"]) == ("cached", "run", "run")


def test_its_settings_are_checked_like_those_of_others(cli: Callable[..., Any]) -> None:
    result = cli("plan", *OWN, "--set", "second.los=1")
    assert result.code == 2
    assert "'second' (own_kind.ECHO), field 'los': unknown option; did you mean 'loss'?" in (
        " ".join(result.err.split())
    )


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('name="own_kind.ECHO"', 'name="ECHO"', "unknown kind of stage 'ECHO'"),
        ('name="own_kind.ECHO"', 'name="nowhere.ECHO"', "'nowhere' cannot be imported"),
        ('run="own_kind:run"', 'run="nowhere:run"', "run = 'nowhere:run' cannot be imported"),
        ('r.prompts("sums")', '"sums"', "stage 'second': its input 'prompts' is 'sums'"),
    ],
)
def test_a_mistake_in_it_is_told(cli: Callable[..., Any], old: str, new: str, problem: str) -> None:
    module = Path("own_kind.py")
    module.write_text(module.read_text().replace(old, new))
    result = cli("plan", *OWN)
    assert result.code == 2
    assert problem in " ".join(result.err.split())
