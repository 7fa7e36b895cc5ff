"""Comparisons out of rollouts: the better response is known, and a model can learn to find it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError


def rollouts(folder: Path, rewards: list[float], *, finished: bool = True) -> str:
    folder.mkdir()
    rows = [
        {
            "id": f"p{problem}",
            "domain": "short",
            "prompt": f"ask {problem}",
            "answer": "",
            "response": f"say {number}",
            "reward": reward,
            "finished": finished,
        }
        for problem in range(40)
        for number, reward in enumerate(rewards)
    ]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def rows_of(ran: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ran.out / "data.jsonl").read_text().splitlines()]


def test_the_verdict_names_the_better_response(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    """Rewards 1, .5 and 0 of `say 0`, `say 1`, `say 2`: 0 against 2; then 1 against 1, nothing."""
    ran = run_stage("comparisons", {}, {"rollouts": rollouts(tmp_path / "r", [1.0, 0.5, 0.0])})
    rows = rows_of(ran)
    assert len(rows) == 40 == ran.metrics["rows"]
    for number, row in enumerate(rows):
        first, second = row["prompt"].removeprefix(f"c ask {number}|").split("|")
        assert {first, second} == {"say 0", "say 2"}
        assert row["demo"] == row["answer"] == ("1" if first == "say 0" else "2")
        assert row["domain"] == "short"
    assert 0.2 < ran.metrics["first_share"] < 0.8


@pytest.mark.parametrize(
    ("settings", "count"), [({"max_per_prompt": 1}, 40), ({}, 80), ({"min_margin": 0.5}, 40)]
)
def test_settings_choose_the_pairs(
    run_stage: Callable[..., Any], tmp_path: Path, settings: dict[str, Any], count: int
) -> None:
    """1 against 0, and .75 against .4: a margin above .5 leaves the first only."""
    found = rollouts(tmp_path / "r", [1.0, 0.75, 0.4, 0.0])
    assert len(rows_of(run_stage("comparisons", settings, {"rollouts": found}))) == count


def test_the_question_can_be_another(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    found = rollouts(tmp_path / "r", [1.0, 0.0])
    ran = run_stage("comparisons", {"template": "{a} or {b}?"}, {"rollouts": found})
    assert {row["prompt"] for row in rows_of(ran)} <= {"say 0 or say 1?", "say 1 or say 0?"}


def test_nothing_to_compare_is_told(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    for name, found in {
        "alike": rollouts(tmp_path / "alike", [1.0, 1.0]),
        "cut": rollouts(tmp_path / "cut", [1.0, 0.0], finished=False),
    }.items():
        with pytest.raises(ConfigError, match="stage 'my_comparisons': no two responses"):
            run_stage("comparisons", {}, {"rollouts": found})
        assert name
