"""A tracker in its own process: it is told everything, and a bad one takes nothing from the run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.engine.runner import Event
from posttrain.trackers import base, sink
from posttrain.trackers.base import About, Stage, TrackerKind, trackers_named
from posttrain.trackers.sink import Sink, Sinks

STAGE = Stage(name="student", kind="sft", version=2, fingerprint="ab" * 32, inputs={"start": "b-1"})


def broken(name: str) -> TrackerKind:
    return TrackerKind(name=name.lower(), place=f"broken:{name}")


@pytest.fixture
def about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> About:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    directory = str(tmp_path / "trackers")
    return About(project="p", name="p-1", config={"seed": 0}, directory=directory, stages=[STAGE])


def events(work: Path, count: int) -> list[Event]:
    started = Event(kind="started", name="student", payload={"log": str(work / "log.txt")})
    lines = [{"step": n, "total": count, "loss": 1 / n} for n in range(1, count + 1)]
    return [started, *(Event(kind="progress", name="student", payload=line) for line in lines)]


def test_every_event_arrives_and_a_second_run_goes_on(about: About, tmp_path: Path) -> None:
    for count in (3, 5):
        with Sinks([broken("Written")], about) as sinks:
            for event in events(tmp_path, count):
                assert not sinks.take(event)
        assert not sinks.warnings
    text = Path(about.directory, "told.jsonl").read_text()
    told = [json.loads(line) for line in text.splitlines()]
    metrics = [line[1:] for line in told if line[0] == "metrics"]
    assert metrics == [["student", n, {"loss": 1 / n}] for n in range(1, 6)]
    assert [line[0] for line in told].count("finish") == 2
    _, name, columns, rows, _ = next(line for line in told if line[0] == "table")
    assert name == "artifacts"
    found = dict(zip(columns, rows[0], strict=True))
    assert found["status"] == "stopped" and found["fingerprint"] == STAGE.fingerprint
    assert found["inputs"] == "start=b-1"


def test_a_failing_tracker_is_one_warning(about: About, tmp_path: Path) -> None:
    first, *others = events(tmp_path, 50)
    with Sinks([broken("Failing"), broken("Written")], about) as sinks:
        assert not sinks.take(first)
        failing = sinks.sinks[0]
        failing.process.wait(60)
        sinks._looked = 0.0
        seen = [text for event in others for text in sinks.take(event)]
    assert sinks.warnings == seen
    (said,) = seen
    assert "RuntimeError: nobody is logged in; the run goes on without it" in said
    assert "much text" in failing.log.read_text()
    assert len(Path(about.directory, "told.jsonl").read_text().splitlines()) == 53


def test_a_hanging_tracker_holds_up_nobody(about: About, tmp_path: Path) -> None:
    hanging = Sink(broken("Hanging"), about, patience=0.5)
    began = time.monotonic()
    # More than a pipe holds.
    for event in events(tmp_path, 20_000):
        hanging.take(event)
    assert time.monotonic() - began < 5
    hanging.end()
    said = hanging.close()
    assert said is not None and "had not sent everything" in said
    assert hanging.process.poll() is not None
    assert hanging.problem() is None


def test_a_tracker_that_cannot_be_started_is_a_warning(about: About, tmp_path: Path) -> None:
    Path(about.directory).write_text("in the way")
    with Sinks([broken("Written")], about) as sinks:
        (said,) = [text for event in events(tmp_path, 3) for text in sinks.take(event)]
    assert sinks.warnings == [said]
    assert said == "written: could not be started (File exists); the run goes on"


def test_without_trackers_nothing_is_started(tmp_path: Path) -> None:
    with Sinks([], None) as sinks:
        assert sinks.take(events(tmp_path, 1)[0]) == ()
    assert not sinks.sinks and not sinks.warnings and sink.PATIENCE > 0


def test_names_are_checked_and_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="no such tracker; did you mean"):
        trackers_named(["tensorbord"])
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'posttrain\[wandb\]'"):
        trackers_named(["wandb"])
    monkeypatch.setattr(base, "find_spec", lambda name: object())
    assert [kind.name for kind in trackers_named(["wandb", "trackio", "wandb"])] == [
        *("wandb", "trackio")
    ]
