"""The stages of a store as they are at this moment: at work, stopped, or finished.

Everything is read from files that stages write anyway, so that watching a run takes nothing from
it. Imports no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.engine.atomic import remembered
from posttrain.engine.errors import StoreError
from posttrain.engine.record import SHORT, Artifact
from posttrain.engine.store import Store
from posttrain.engine.unfinished import Unfinished, unfinished
from posttrain.engine.work import METRICS, RESULT, STAGE, is_held
from posttrain.report.gather import StageFacts, facts_of, numbers_of
from posttrain.report.progress import WINDOW_SECONDS, Progress, State
from posttrain.report.samples import SAMPLES, Sample, parse_samples
from posttrain.stages.kinds import shown_kind


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One stage at this moment."""

    facts: StageFacts
    """What it is, the lines that it has logged, its samples."""
    progress: Progress
    """State, step, rate, and how long it takes still."""

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.facts.name

    @property
    def state(self) -> State:
        """What it does; "pending" is one that was stopped, or was not begun."""
        return self.progress.state

    @property
    def curves(self) -> dict[str, list[float]]:
        """The metrics that matter for its kind, as far as it logs them: name -> values."""
        kind = shown_kind(self.facts.kind)
        keys = dict.fromkeys((*kind.headline, *kind.panels))
        values = {
            key: [line[key] for line in self.facts.lines if key in line] for key in list(keys)
        }
        return {key: found for key, found in values.items() if len(found) > 1}

    @property
    def newest_samples(self) -> list[Sample]:
        """Those of the last step that has some."""
        samples = self.facts.samples
        return [sample for sample in samples if sample.step == samples[-1].step]

    def told(self) -> dict[str, Any]:
        """All of it as JSON."""
        progress, step = self.progress, self.progress.step
        return {
            "name": self.name,
            "kind": self.facts.kind,
            "fingerprint": self.facts.fingerprint,
            "state": SAID.get(self.state, self.state),
            "reason": progress.reason,
            "step": step[0] if step else None,
            "total": step[1] if step else None,
            "seconds": round(progress.elapsed, 3),
            "tokens_per_second": None if progress.rate is None else round(progress.rate, 3),
            "eta_seconds": None if progress.left is None else round(progress.left, 3),
            "metrics": dict(progress.metrics),
            "curves": self.curves,
            "samples": [
                {"step": s.step, "domain": s.domain, "texts": s.texts, "numbers": s.numbers}
                for s in self.newest_samples
            ],
            "warnings": list(self.facts.warnings),
        }


SAID: Mapping[str, str] = {"pending": "stopped"}
"""State -> the word for it, where nothing else tells that it was begun."""


def in_work(store: Store) -> list[Watched]:
    """The stages that have a work directory and no artifact: those that run first."""
    found = [_of_work(one) for one in unfinished(store)]
    return sorted(found, key=lambda one: one.state != "running")


def finished(artifact: Artifact) -> Watched:
    """A stage that has left an artifact."""
    facts = facts_of(artifact)
    # Not all metrics of a record are numbers of steps: the last line, and the summary over it.
    last = facts.lines[-1] if facts.lines else {}
    progress = Progress(
        name=facts.name,
        kind=facts.kind,
        state="done",
        metrics={**last, **artifact.metrics},
        seconds=facts.seconds,
        path=str(artifact.path),
    )
    return Watched(facts=facts, progress=progress)


def not_begun(name: str, kind: str, fingerprint: str) -> Watched:
    """A stage of which there is nothing yet."""
    record = _record({"name": name, "kind": kind, "fingerprint": fingerprint}, warnings=())
    progress = Progress(name=name, kind=kind)
    return Watched(facts=StageFacts(record=record, edges={}), progress=progress)


def _of_work(one: Unfinished) -> Watched:
    lines = _lines(one.path / METRICS)
    facts = StageFacts(
        record=_record(one.stage, warnings=one.warnings),
        edges={edge: Path(path).name for edge, path in one.stage["inputs"].items()},
        lines=lines,
        samples=parse_samples(_content(one.path / "out" / SAMPLES)),
    )
    progress = Progress(name=one.name, kind=one.kind, warnings=list(facts.warnings))
    progress.metrics = lines[-1] if lines else {}
    progress.seconds = float(progress.metrics.get("seconds", 0.0))
    if is_held(one.path):
        progress.state = "running"
        newest = one.path / (METRICS if lines else STAGE)
        progress.began = time.monotonic() - progress.seconds - _age(newest)
        since = progress.seconds - WINDOW_SECONDS
        # The last line before the window as well, so that it spans all of it.
        late = sum(line.get("seconds", 0.0) >= since for line in lines)
        progress.window.extend(lines[-late - 1 :])
    else:
        result = remembered(one.path / RESULT)
        result = result if isinstance(result, dict) else {}
        progress.state = (
            "needs input" if "waiting" in result else "failed" if "error" in result else "pending"
        )
        progress.reason = str(result.get("waiting", result.get("error", "")))
    return Watched(facts=facts, progress=progress)


def _record(stage: Mapping[str, Any], *, warnings: Sequence[str]) -> dict[str, Any]:
    """What of a record is known before there is one."""
    none: dict[str, Any] = {"inputs": {}, "metrics": {}, "provenance": {}, "config": {}}
    return none | dict(stage) | {"inputs": {}, "warnings": list(warnings)}


def _lines(path: Path) -> list[dict[str, float]]:
    """The lines of metrics that a running stage has written; the last one may be half there."""
    found = []
    for line in _content(path).splitlines():
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, dict):
            found.append(numbers_of(parsed))
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        # Not there yet, or committed a moment ago.
        return b""


def _age(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def of_run(store: Store, seen: Iterable[str]) -> list[Watched]:
    """What runs now, all that it descends from, and the stages of the fingerprints `seen`:
    ancestors first, domains left out."""
    at_work = [one for one in unfinished(store) if is_held(one.path)]
    index = store.index()
    paths = [Path(path) for one in at_work for path in one.stage["inputs"].values()]
    paths += [index[print_[:SHORT]] for print_ in seen if print_[:SHORT] in index]
    made: dict[str, Artifact] = {}
    while paths:
        path = paths.pop()
        if path.name in made:
            continue
        try:
            artifact = store.load(path)
        except StoreError:
            # Damaged, or removed meanwhile: the page goes on without it.
            continue
        made[path.name] = artifact
        sources = (source["fingerprint"][:SHORT] for source in artifact.inputs.values())
        paths += [index[source] for source in sources if source in index]
    shown = [a for a in made.values() if "problems" not in shown_kind(a.kind).makes]
    done = [finished(artifact) for artifact in sorted(shown, key=lambda a: a.created)]
    return done + [_of_work(one) for one in at_work]


def of_stages(store: Store, stages: Iterable[tuple[str, str, str]]) -> list[Watched]:
    """What is there of these stages, (name, kind, fingerprint) each, in their order; domains left
    out."""
    at_work = {one.facts.fingerprint: one for one in in_work(store)}
    found = []
    for name, kind, fingerprint in stages:
        if "problems" in shown_kind(kind).makes:
            continue
        artifact = store.find(fingerprint)
        if artifact is not None:
            found.append(finished(artifact))
        else:
            found.append(at_work.get(fingerprint) or not_begun(name, kind, fingerprint))
    return found
