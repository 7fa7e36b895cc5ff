"""Run a graph: every stage in its own process, several at once, each committed by this process when
it ended well.

        plan --> ready stages --> begin (lock) --> stage process --> result.json
                     ^                                                  |
                     +---- artifact <---- commit (hash, rename) <-------+

`run` is a generator of events: the caller prints them, or does not. A stage that fails blocks only
what depends on it. A run that is stopped, or killed, leaves the store whole; the same command goes
on where it ended.
"""

import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from posttrain.engine.atomic import guarded
from posttrain.engine.errors import ConfigError, Interrupted, PosttrainError, StageError, Waiting
from posttrain.engine.fingerprint import plain
from posttrain.engine.graph import Graph
from posttrain.engine.hashes import HASHES
from posttrain.engine.links import renew
from posttrain.engine.planner import PlanRow, plan
from posttrain.engine.process import (
    LOG,
    Failure,
    Job,
    Running,
    Wait,
    note_stage,
    prepare,
    start,
    stop,
)
from posttrain.engine.provenance import Provenance
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.engine.work import Work, read_facts, read_step

_POLL_SECONDS: Final = 0.05
_PROGRESS_SECONDS: Final = 0.2

EventKind: TypeAlias = Literal[
    "started", "progress", "warning", "finished", "cached", "failed", "blocked", "needs input"
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a stage.

    Payload by kind: started {"reason", "threads", "log"}; progress: one line of metrics.jsonl as it
    is, or {"waiting": why} while another run works on that stage; warning {"text"}: before the
    stage ends, or after it was cached; finished {"metrics", "path"};
    cached {"path", "reason"}; failed {"error", "log"}; blocked {"reason"};
    needs input {"reason"}: it ended, and goes on in a later run when a file has been filled in.
    """

    kind: EventKind
    name: str
    seconds: float = 0.0
    """Since the stage started in this run."""
    payload: Mapping[str, Any] = field(default_factory=dict)


def run(
    graph: Graph,
    store: Store,
    *,
    execute: str,
    jobs: int = 1,
    preload: Sequence[str] = (),
    provenance: Provenance | None = None,
    environment: Mapping[str, str] | None = None,
    cores: int | None = None,
) -> Generator[Event, None, None]:
    """Make the targets of `graph` and all they depend on, but for what is in the store already.

    `execute` names the function that a stage process calls with its Job, "package.module:function"
    or "path/to/file.py:function"; it fills `job.out` and returns a dict of metrics. Up to `jobs`
    stages run at once; a stage gets `cores` (default: those this process may use) divided by how
    many could run beside it. Modules in `preload` are imported once, before stages fork; a fresh
    interpreter must be able to import them.

    Raises at once: GraphError, ConfigError (a stage is blocked from the start, `jobs` < 1),
    StoreError. Raises from the generator, after all that could finish has: StageError where a stage
    failed, else Waiting where one needs a file that is to be filled in; at any time: Interrupted
    on Ctrl-C (or another KeyboardInterrupt, such as Terminated), when the stage processes are gone;
    StoreError when there is no space to start a stage. Closing the generator stops the stages
    as well.
    """
    if jobs < 1:
        raise ConfigError(f"jobs: {jobs} is less than 1; give the number of stages to run at once")
    return _Run(
        graph=graph,
        store=store,
        rows=_planned(graph, store),
        execute=execute,
        jobs=jobs,
        preload=tuple(preload),
        provenance=provenance or Provenance(),
        environment=dict(environment or {}),
        cores=cores or usable_cores(),
    ).events()


def _planned(graph: Graph, store: Store) -> dict[str, PlanRow]:
    """The plan by name of stage. Raises ConfigError where something is blocked."""
    rows = plan(graph, store)
    blocked = [row for row in rows if row.action == "blocked"]
    if blocked:
        lines = "\n".join(f"  {row.name}: {row.reason}" for row in blocked)
        wanted = ", ".join(graph.targets)
        raise ConfigError(f"{wanted} cannot be made; blocked:\n{lines}")
    return {row.name: row for row in rows}


def usable_cores() -> int:
    """Processor cores this process may use; not every system can say, then those it has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(kw_only=True)
class _Run:
    """State of one run."""

    graph: Graph
    store: Store
    rows: Mapping[str, PlanRow]
    execute: str
    jobs: int
    preload: Sequence[str]
    provenance: Provenance
    environment: Mapping[str, str]
    cores: int
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    waits: dict[str, Wait] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    first: dict[str, str] = field(default_factory=dict)
    """Fingerprint -> the first stage that has it."""

    def events(self) -> Generator[Event, None, None]:
        whole = all(row.artifact is not None and not row.moved for row in self.rows.values())
        if whole:
            yield from self._take_cached()
            return
        with self.store.in_use():
            # The lock may have been waited for, and what was there is gone: plan again under it.
            self.rows = _planned(self.graph, self.store)
            for row in self.rows.values():
                if row.artifact is not None:
                    renew(self.store.root, row.artifact, row.moved)
            yield from self._take_cached()
            try:
                while self.left or self.running:
                    yield from self._start_ready()
                    self._pause()
                    yield from self._progress()
                    yield from self._collect()
            except KeyboardInterrupt as stop_signal:
                code = getattr(stop_signal, "exit_code", Interrupted.exit_code)
                raise _interrupted(self.store.root, self.running.values(), code) from None
            finally:
                stop(self.running.values())
        if self.failures or self.waits:
            raise _ended(self.failures, self.waits, self.blocked)

    def _take_cached(self) -> Iterator[Event]:
        for name, row in self.rows.items():
            self.first.setdefault(row.fingerprint, name)
            if row.artifact is None:
                self.left.append(name)
            else:
                self.artifacts[name] = row.artifact
                yield from _cached(name, row.artifact, row.reason)

    # -- starting --------------------------------------------------------------------------------

    def _start_ready(self) -> Iterator[Event]:
        for name in list(self.left):
            node = self.graph.nodes[name]
            cause = self._cause(name)
            if cause is not None:
                self.left.remove(name)
                self.blocked[name] = cause
                yield Event(kind="blocked", name=name, payload={"reason": cause})
                continue
            if any(source not in self.artifacts for source in node.inputs.values()):
                continue
            twin = self._twin(name)
            if twin is not None and twin in self.artifacts:
                self.left.remove(name)
                self.artifacts[name] = self.artifacts[twin]
                yield from _cached(name, self.artifacts[twin], f"same as {twin}")
            elif twin is None and len(self.running) < self.jobs:
                yield from self._start(name)

    def _cause(self, name: str) -> str | None:
        """Why a stage can no longer be made, None if it can."""
        twin = self._twin(name)
        for edge, source in self.graph.nodes[name].inputs.items():
            if source in self.waits:
                return f"waits for {source} (input {edge})"
            if source in self.failures or source in self.blocked:
                state = "failed" if source in self.failures else "is blocked"
                return f"input {edge} {state} ({source})"
        if twin in self.waits:
            return f"waits for {twin}, which is the same"
        return f"same as {twin}, which failed" if twin in self.failures else None

    def _twin(self, name: str) -> str | None:
        """The first stage with the same fingerprint, if that is another one."""
        first = self.first[self.rows[name].fingerprint]
        return None if first == name else first

    def _start(self, name: str) -> Iterator[Event]:
        row = self.rows[name]
        # No waiting here: other stages may be ready, and those at work are to be watched.
        work = self.store.begin(row.fingerprint, wait=False)
        if work is None:
            if name not in self.waiting:
                self.waiting.add(name)
                reason = "another run is working on this stage"
                yield Event(kind="progress", name=name, payload={"waiting": reason})
            return
        self.left.remove(name)
        # Looked for again under the lock: it may have been committed since the plan.
        present = self.store.find(row.fingerprint)
        if present is not None:
            work.discard()
            self.artifacts[name] = present
            yield from _cached(name, present, "made by another run")
            return
        job = self._job(name, work)
        with guarded(self.store.root, "starting work"):
            note_stage(job, work.path)
        running = prepare(job, self.execute, work, self.preload)
        # Known before it lives, so that an interrupt at any moment finds it.
        self.running[name] = running
        start(running)
        reason = row.reason if running.resumed is None else f"resumes at step {running.resumed}"
        payload = {"reason": reason, "threads": job.threads, "log": str(work.path / LOG)}
        yield Event(kind="started", name=name, payload=payload)

    def _job(self, name: str, work: Work) -> Job:
        node = self.graph.nodes[name]
        return Job(
            name=node.name,
            kind=node.kind,
            version=node.version,
            fingerprint=self.rows[name].fingerprint,
            config=plain(node.config),
            data=dict(node.data),
            runtime=plain(node.runtime, at=f"stage {name}: runtime"),
            inputs={edge: str(self.artifacts[n].path) for edge, n in node.inputs.items()},
            work=str(work.path),
            out=str(work.out),
            threads=max(1, self.cores // min(self.jobs, self.graph.width(name))),
            hashes=str(self.store.root / HASHES),
            environment=self.environment,
        )

    # -- watching --------------------------------------------------------------------------------

    def _pause(self) -> None:
        if self.running:
            connection.wait([r.process.sentinel for r in self.running.values()], _POLL_SECONDS)
        # Nothing runs, yet something is left: another run works on it.
        elif self.left:
            time.sleep(_POLL_SECONDS)

    def _progress(self) -> Iterator[Event]:
        for name, running in self.running.items():
            if time.monotonic() - running.looked >= _PROGRESS_SECONDS:
                yield from self._news(name, running)

    def _news(self, name: str, running: Running) -> Iterator[Event]:
        for payload in running.new_metrics():
            yield Event(kind="progress", name=name, seconds=running.seconds, payload=payload)
        for text in running.new_warnings():
            yield Event(kind="warning", name=name, seconds=running.seconds, payload={"text": text})

    def _collect(self) -> Iterator[Event]:
        for name, running in list(self.running.items()):
            if running.process.is_alive():
                continue
            # Taken before the commit, whose hashing is no part of the stage.
            seconds = running.seconds
            # What it logged between the last look and its end.
            yield from self._news(name, running)
            outcome = self._outcome(name, running, seconds)
            del self.running[name]
            if isinstance(outcome, Wait):
                running.work.release()
                self.waits[name] = outcome
                reason = {"reason": outcome.reason}
                yield Event(kind="needs input", name=name, seconds=seconds, payload=reason)
            elif isinstance(outcome, Failure):
                running.work.release()
                self.failures[name] = outcome
                problem = {"error": outcome.reason(name), "log": outcome.log}
                yield Event(kind="failed", name=name, seconds=seconds, payload=problem)
            else:
                self.artifacts[name] = outcome
                payload = {"metrics": outcome.metrics, "path": str(outcome.path)}
                yield Event(kind="finished", name=name, seconds=seconds, payload=payload)

    def _outcome(self, name: str, running: Running, seconds: float) -> Artifact | Failure | Wait:
        """The committed artifact of a stage that has ended, or how it failed or what it waits
        for."""
        metrics = running.outcome()
        if isinstance(metrics, Failure | Wait):
            return metrics
        node = self.graph.nodes[name]
        facts = {
            **self.provenance.facts,
            "seconds": round(seconds, 3),
            "threads": running.job.threads,
            "resumed_at_step": running.resumed,
            **self.provenance.of_stages.get(self.rows[name].fingerprint, {}),
            **read_facts(running.work.path),
        }
        if "origin" in node.runtime:
            facts["origin"] = node.runtime["origin"]
        try:
            return self.store.commit(
                node,
                running.work,
                inputs={edge: self.artifacts[source] for edge, source in node.inputs.items()},
                metrics=metrics,
                provenance=facts,
                diff=self.provenance.diff,
            )
        except PosttrainError as error:
            return Failure(error=str(error), exit_code=error.exit_code, log=None)


def _cached(name: str, artifact: Artifact, reason: str) -> Iterator[Event]:
    yield Event(kind="cached", name=name, payload={"path": str(artifact.path), "reason": reason})
    for text in artifact.warnings:
        yield Event(kind="warning", name=name, payload={"text": text})


# -- what a run says when it ends without its target -----------------------------------------------


def _interrupted(root: Path, running: Iterable[Running], exit_code: int) -> Interrupted:
    """Stopped by a signal; `running` are the stages that were at work, `root` is the store."""
    steps = ((stage.job.name, read_step(stage.work.path)) for stage in running)
    where = ", ".join(
        name if step is None else f"{name} (resumes at step {step})" for name, step in steps
    )
    unfinished = f" Not finished: {where}." if where else ""
    return Interrupted(
        f"stopped. What was finished is kept in {root}.{unfinished} "
        f"To go on, run the same command again.",
        exit_code,
    )


def _ended(
    failures: Mapping[str, Failure], waits: Mapping[str, Wait], blocked: Mapping[str, str]
) -> StageError | Waiting:
    """Why the target was not made: at least one stage failed, or else waits for a file to be filled
    in. The exit code is the first failure's."""
    lines = [failure.describe(name) for name, failure in failures.items()]
    lines += [f"stage {name} waits: {wait.reason}" for name, wait in waits.items()]
    lines += [f"blocked: {name}: {reason}" for name, reason in blocked.items()]
    if not failures:
        lines.append("What finished is kept. Once this is filled in, run the same command again.")
        return Waiting("\n".join(lines))
    lines.append("What finished is kept; once the cause is mended, run the same command again.")
    return StageError("\n".join(lines), exit_code=next(iter(failures.values())).exit_code)
