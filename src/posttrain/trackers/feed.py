"""From the events of a run to what a tracker is told.

What was told stands in a file beside, so that a run that goes on after a stop tells no step twice:
the steps that a resumed stage makes again have the same numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.engine.atomic import remembered, write_whole
from posttrain.engine.record import RECORD, SHORT
from posttrain.engine.work import METRICS
from posttrain.report.samples import SAMPLES, parse_samples
from posttrain.report.scores import evaluation_rows, recovery_rows
from posttrain.trackers.base import About, Cell, Tracker

SAVE_SECONDS = 2.0
"""Between two notes of what was told; after a kill in between, some steps are told twice."""
FINAL = "final"
"""The summary of a stage is `STAGE/final/METRIC`."""
AXIS = ("step", "total")
"""Numbers of a line of metrics that say where it stands."""
EVALUATION_COLUMNS = ("student", "domain", "model", "decoding", "accuracy", "low", "high")
RECOVERY_COLUMNS = ("student", "domain", "decoding", "recovery", "low", "high")
ARTIFACT_COLUMNS = ("stage", "kind", "version", "status", "seconds", "fingerprint", "inputs")


class Feed:
    """Tells one tracker about one run."""

    def __init__(self, tracker: Tracker, about: About, note: Path) -> None:
        """`note` is the file with what the tracker was told before."""
        self.tracker, self.about, self.note = tracker, about, note
        self.labels = {s.name: f"{s.name}-{s.fingerprint[:SHORT]}" for s in about.stages}
        found = remembered(note)
        self.told: dict[str, Any] = found if isinstance(found, dict) else {}
        """Label of a stage -> {"step": of the last line, "samples": of the last, "ended"}."""
        self.work: dict[str, Path] = {}
        """Stage -> its work directory, while it runs."""
        self.status: dict[str, tuple[str, float]] = {}
        self._saved = time.monotonic()
        tracker.begin(about)

    def take(self, kind: str, stage: str, seconds: float, payload: Mapping[str, Any]) -> None:
        """One event of the run; see `engine.runner.Event`."""
        if kind == "started":
            self.work[stage] = Path(payload["log"]).parent
            self.status[stage] = ("stopped", 0.0)
        elif kind == "progress":
            self._line(stage, payload)
            if stage in self.work:
                self._samples(stage, self.work[stage] / "out" / SAMPLES)
        elif kind in ("finished", "cached"):
            self.status[stage] = ("ran" if kind == "finished" else "cached", seconds)
            self._ended(stage, Path(payload["path"]))
        elif kind != "warning":
            self.status[stage] = (kind, seconds)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def close(self) -> None:
        """The run has ended: tell what became of every stage, and finish."""
        rows: list[Sequence[Cell]] = []
        for stage in self.about.stages:
            status, seconds = self.status.get(stage.name, ("pending", 0.0))
            inputs = ", ".join(f"{edge}={label}" for edge, label in stage.inputs.items())
            facts = (stage.name, stage.kind, stage.version, status, round(seconds, 3))
            rows.append((*facts, stage.fingerprint, inputs))
        self.tracker.table("artifacts", ARTIFACT_COLUMNS, rows, 0)
        self.tracker.finish()
        self.save()

    def save(self) -> None:
        """Note what was told."""
        self._saved = time.monotonic()
        write_whole(self.note, json.dumps(self.told).encode("ascii"))

    def _of(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = self.told.setdefault(self.labels.get(stage, stage), {})
        return found

    def _line(self, stage: str, line: Mapping[str, Any]) -> None:
        """One line of metrics, unless it was told before."""
        step, told = line.get("step"), self._of(stage)
        if not isinstance(step, int) or step <= told.get("step", 0):
            return
        values = {name: value for name, value in numbers(line) if name not in AXIS}
        self.tracker.metrics(stage, step, values)
        told["step"] = step

    def _samples(self, stage: str, path: Path) -> None:
        """The samples of a file that is being written, where there are new ones."""
        try:
            content = path.read_bytes()
        except OSError:
            # Not there yet, or just committed: then the end of the stage tells them.
            return
        found = parse_samples(content)
        told = self._of(stage)
        if not found or found[-1].step <= told.get("samples", 0):
            return
        texts = dict.fromkeys(name for sample in found for name in sample.texts)
        values = dict.fromkeys(name for sample in found for name in sample.numbers)
        rows: list[Sequence[Cell]] = [
            (
                *(sample.step, sample.domain),
                *(sample.texts.get(name) for name in texts),
                *(sample.numbers.get(name) for name in values),
            )
            for sample in found
        ]
        columns = ("step", "domain", *texts, *values)
        self.tracker.table(f"{stage}/samples", columns, rows, found[-1].step)
        told["samples"] = found[-1].step

    def _ended(self, stage: str, path: Path) -> None:
        """What a committed stage left: lines not told yet, samples, its summary, its tables."""
        told = self._of(stage)
        if told.get("ended"):
            return
        for line in lines_of(path / METRICS):
            self._line(stage, line)
        self._samples(stage, path / SAMPLES)
        record = remembered(path / RECORD)
        summary = record.get("metrics", {}) if isinstance(record, dict) else {}
        step = told.get("step", 0)
        values = {f"{FINAL}/{name}": value for name, value in numbers(summary)}
        if values:
            self.tracker.metrics(stage, step, values)
        evaluation = remembered(path / "evaluation.json")
        if isinstance(evaluation, dict):
            tables = {
                "evaluation": (EVALUATION_COLUMNS, evaluation_rows(evaluation)),
                "recovery": (RECOVERY_COLUMNS, recovery_rows(evaluation)),
            }
            for name, (columns, rows) in tables.items():
                if rows:
                    self.tracker.table(f"{stage}/{name}", columns, rows, step)
        told["ended"] = True


def numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among some values."""
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of metrics; [] where there is none. A damaged line is left out."""
    try:
        content = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in content:
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, dict):
            found.append(parsed)
    return found
