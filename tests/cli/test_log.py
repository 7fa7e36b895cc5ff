"""`run --log` and `sweep --log`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.trackers import base

Cli = Callable[..., Any]
MINI = ("mini.py", "--suite", "pairs.toml", "--no-report")


def told(folder: Path, kind: str) -> dict[str, Any]:
    (note,) = (folder / "posttrain-store/trackers").glob(f"mini-*.{kind}.json")
    found: dict[str, Any] = json.loads(note.read_text())
    return found


def test_a_finished_run_is_told_afterwards(cli: Cli, done: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli("run", *MINI, "--log", "tensorboard", "--json").json["warnings"] == [
        *cli("run", *MINI, "--json").json["warnings"]
    ]
    (folder,) = (done / "posttrain-store/trackers/tensorboard").iterdir()
    found = EventAccumulator(str(folder))
    found.Reload()
    assert [event.step for event in found.Tensors("student/kl")] == [1, 2]
    tags = set(found.Tags()["tensors"])
    assert {"sft/samples", "evaluation/evaluation", "artifacts", "student/final/kl"} <= tags
    steps = {
        label.rpartition("-")[0]: fact.get("step")
        for label, fact in told(done, "tensorboard").items()
    }
    assert steps["student"] == 2 and steps["evaluation"] == 4


def test_a_tracker_that_fails_is_a_warning(
    cli: Cli, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "trackers"), prepend=":")
    failing = base.TrackerKind(name="wandb", place="broken:Failing")
    monkeypatch.setattr(base, "TRACKERS", {"wandb": failing})
    monkeypatch.setattr(base, "find_spec", lambda name: object())
    monkeypatch.setenv("POSTTRAIN_LOG", "wandb")
    result = cli("run", *MINI, "--json")
    (said,) = [w for w in result.json["warnings"] if w["text"].startswith("wandb: ")]
    assert said["stage"] is None
    assert "RuntimeError: nobody is logged in; the run goes on without it" in said["text"]
    assert "nobody is logged in" in result.err


@pytest.mark.parametrize("command", [("run",), ("sweep", "--seeds", "0,1")])
def test_what_cannot_log_is_refused_before_anything_runs(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    result = cli(*command, *MINI, "--log", "mlflow")
    assert result.code == 2 and "no such tracker" in result.err and "trackio" in result.err
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    result = cli(*command, *MINI, "--log", "trackio")
    assert result.code == 2 and "pip install 'posttrain[trackio]'" in result.err
    monkeypatch.setenv("POSTTRAIN_SAMPLES", "often")
    result = cli(*command, *MINI)
    assert result.code == 2 and "POSTTRAIN_SAMPLES='often' is no number of steps" in result.err
    assert not (place / "posttrain-store/artifacts").exists()


def test_a_sweep_logs_every_variant(cli: Cli, place: Path, swept_once: Path) -> None:
    pytest.importorskip("tensorboard")
    shutil.copytree(swept_once / "posttrain-store", place / "posttrain-store")
    axes = ("--axis", "student.lr=1e-4,0.02", "--seeds", "0,1")
    assert cli("sweep", *MINI, *axes, "--log", "tensorboard").code == 0
    students = [name for name in told(place, "tensorboard") if name.startswith("student[")]
    assert len(students) == 4
