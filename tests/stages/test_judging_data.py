"""Rollouts become questions that teach a model to compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError

Run = Callable[..., Any]


@pytest.fixture
def rollouts(tmp_path: Path) -> Callable[..., str]:
    """`rollouts(*rewards)` makes an artifact: a response of each reward to each of 20 problems."""

    def make(*rewards: float) -> str:
        path = tmp_path / "rollouts"
        path.mkdir()
        record = {"format": 1, "name": "r", "kind": "sample", "fingerprint": "1" * 64}
        (path / "record.json").write_text(json.dumps(record))
        rows = [
            {"id": str(i), "domain": "short", "prompt": f"p{i}", "answer": "a", "finished": True}
            | {"response": f"r{reward}", "reward": reward}
            for i in range(20)
            for reward in rewards
        ]
        (path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def test_the_better_response_is_the_answer(run_stage: Run, rollouts: Run) -> None:
    made = rollouts(0.0, 0.5, 1.0)
    ran = run_stage("comparisons", {"max_per_prompt": 1}, {"rollouts": made})
    rows = [json.loads(line) for line in (ran.out / "data.jsonl").read_text().splitlines()]
    assert len(rows) == ran.metrics["rows"] == 20
    for row in rows:
        assert row["domain"] == "comparisons"
        first, second = row["prompt"].split("|")[1:]
        assert {first, second} == {"r0.0", "r1.0"}
        assert row["demo"] == row["answer"] == ("1" if first == "r1.0" else "2")
    assert {row["demo"] for row in rows} == {"1", "2"}


def test_settings_are_read(run_stage: Run, rollouts: Run) -> None:
    inputs = {"rollouts": rollouts(0.0, 0.2, 0.5, 1.0)}
    assert run_stage("comparisons", {}, inputs).metrics["rows"] == 40
    assert run_stage("comparisons", {"min_margin": 0.5}, inputs).metrics["rows"] == 20
    ran = run_stage("comparisons", {"template": "{a} or {b}?"}, inputs)
    assert " or " in (ran.out / "data.jsonl").read_text().splitlines()[0]


def test_nothing_to_compare_names_the_stage(run_stage: Run, rollouts: Run) -> None:
    with pytest.raises(ConfigError, match="stage 'my_comparisons': no two responses"):
        run_stage("comparisons", {}, {"rollouts": rollouts(1.0)})


def test_a_model_learns_from_them(
    run_stage: Run, rollouts: Run, save_record: Run, models: Mapping[str, str]
) -> None:
    data = run_stage("comparisons", {}, {"rollouts": rollouts(0.0, 1.0)})
    save_record(data.out)
    inputs = {"start": models["start"], "data": str(data.out)}
    ran = run_stage("sft", {"steps": 40, "lr": 0.01, "warmup_steps": 1}, inputs)
    assert ran.lines[-1]["loss"] < 0.5 < ran.lines[0]["loss"]


@pytest.fixture
def save_record() -> Callable[[Path], None]:
    """Gives what a stage left the record of an artifact."""

    def save(path: Path) -> None:
        record = {"format": 1, "name": "c", "kind": "comparisons", "fingerprint": "1" * 64}
        (path / "record.json").write_text(json.dumps(record))

    return save
