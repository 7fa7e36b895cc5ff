"""A run in which a stage waits for a file, seen from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.stages import worker

COMMAND = ("mini.py", "--suite", "pairs.toml")
STAGES = f"{Path(__file__).with_name('waiting_stages.py')}:run_job"


def test_a_run_waits_and_the_same_command_goes_on(
    cli: Callable[..., Any], done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "EXECUTE", STAGES)
    # Another group size: both teachers run again, and what depends on them.
    changed = (*COMMAND, "--set", "*_teacher.group_size=3")
    first = cli("run", *changed, "--jobs", "1")
    assert first.code == 3
    assert "waiting: stage sums_teacher waits: create the file go" in first.err
    assert "error" not in first.err
    assert "blocked: student: waits for sums_teacher (input teachers.sums_teacher)" in first.err
    assert "needs input sums_teacher: create the file go" in first.out
    assert "done        copies_teacher" in first.out

    planned = cli("plan", *changed, "--json").json
    found = {s["name"]: (s["action"], s["reason"]) for s in planned["stages"]}
    assert found["sums_teacher"] == ("needs input", "create the file go")
    assert found["copies_teacher"][0] == "cached"
    assert found["student"] == ("needs input", "for sums_teacher (input teachers.sums_teacher)")
    assert "2 cached" not in cli("plan", *changed).out.splitlines()[0]
    assert "3 needs input" in cli("plan", *changed).out.splitlines()[0]

    again = cli("run", *changed, "--jobs", "1", "--json")
    assert again.code == 3
    status = {s["name"]: s["status"] for s in json.loads(again.out)["stages"]}
    assert status["sums_teacher"] == "needs input"
    assert status["student"] == status["evaluation"] == "blocked"

    (done / "go").touch()
    last = cli("run", *changed, "--jobs", "1", "--json").json
    status = {s["name"]: s["status"] for s in last["stages"]}
    assert (status["sums_teacher"], status["copies_teacher"]) == ("ran", "cached")
    assert status["student"] == status["evaluation"] == "ran"
