"""The run's end of the trackers: starts their processes, hands them every event, and never waits.

A thread of each writes into its pipe, so that a tracker that does not read holds up nobody. What a
tracker fails with becomes one warning.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from posttrain.engine.runner import Event
from posttrain.trackers.base import About, TrackerKind

PATIENCE = 60.0
"""Seconds that a tracker may take, after the run has ended, to send what is left."""
LOG_TAIL = 4096


class Sink:
    """One tracker of one run."""

    def __init__(self, kind: TrackerKind, about: About, *, patience: float = PATIENCE) -> None:
        """Starts its process."""
        self.kind, self.patience = kind, patience
        folder = Path(about.directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{about.name}.{kind.name}.log"
        command = [sys.executable, "-m", "posttrain.trackers.process", kind.place]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, str(folder / f"{about.name}.{kind.name}.json")],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                encoding="utf-8",
                # Out of the reach of Ctrl-C: the end of its input ends it.
                start_new_session=True,
            )
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._pump, name=kind.name, daemon=True)
        self._thread.start()
        self._told, self._ended = False, 0.0
        self._put(asdict(about))

    def take(self, event: Event) -> None:
        """Hand on one event."""
        if not self._told:
            self._put(asdict(event))

    def problem(self) -> str | None:
        """What the user is to be told of it, once: that it has failed."""
        if self._told or self.process.poll() in (None, 0):
            return None
        self._told = True
        return f"{self.kind.name}: {_last_line(self.log)}; the run goes on without it ({self.log})"

    def end(self) -> None:
        """There are no more events."""
        self._ended = time.monotonic()
        self._queue.put(None)

    def close(self) -> str | None:
        """Wait until it has finished; returns what the user is to be told, if anything."""
        try:
            self.process.wait(max(0.0, self._ended + self.patience - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            if self._told:
                return None
            self._told = True
            return (
                f"{self.kind.name}: it had not sent everything {self.patience:.0f} s after the end "
                f"of the run and was stopped; what it lacks is in the store ({self.log})"
            )
        return self.problem()

    def _put(self, content: Mapping[str, Any]) -> None:
        self._queue.put(json.dumps(content, default=str) + "\n")

    def _pump(self) -> None:
        """Write what is in the queue into the pipe, until the end."""
        assert self.process.stdin is not None, "it was opened as a pipe"
        # A tracker that has failed reads no more.
        with suppress(OSError, ValueError):
            while (line := self._queue.get()) is not None:
                self.process.stdin.write(line)
                if self._queue.empty():
                    self.process.stdin.flush()
        with suppress(OSError, ValueError):
            self.process.stdin.close()


class Sinks:
    """All trackers of a run.

        with Sinks(trackers_named(["wandb"]), about) as sinks:
            for event in run(...):
                sinks.take(event)

    Without a tracker it does nothing.
    """

    def __init__(self, kinds: Sequence[TrackerKind], about: About | None) -> None:
        """`about` may be None where there are no trackers. They start with the first event: by then
        the store is there."""
        self.kinds, self.about = kinds, about
        self.sinks: list[Sink] = []
        self.warnings: list[str] = []
        """What went wrong so far, one sentence each."""
        self._looked, self._started = 0.0, False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # All at once: each may take its time to send what is left.
        for sink in self.sinks:
            sink.end()
        self._add([sink.close() for sink in self.sinks])

    def take(self, event: Event) -> Sequence[str]:
        """Hand on one event; returns new problems, to be shown."""
        if self.about is not None and not self._started:
            self._started = True
            problems = self._start(self.about)
            return [*problems, *self.take(event)]
        for sink in self.sinks:
            sink.take(event)
        if not self.sinks or time.monotonic() - self._looked < 1.0:
            return ()
        self._looked = time.monotonic()
        return self._add(sink.problem() for sink in self.sinks)

    def _start(self, about: About) -> Sequence[str]:
        problems = []
        for kind in self.kinds:
            try:
                self.sinks.append(Sink(kind, about))
            except OSError as error:
                # No space for its log, or no process to be had.
                why = error.strerror or error
                problems.append(f"{kind.name}: could not be started ({why}); the run goes on")
        return self._add(problems)

    def _add(self, problems: Iterable[str | None]) -> Sequence[str]:
        found = [problem for problem in problems if problem]
        self.warnings += found
        return found


def _last_line(log: Path) -> str:
    """How it failed, in its own words."""
    with suppress(OSError):
        lines = log.read_bytes()[-LOG_TAIL:].decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it ended")
    return "it ended"
