"""One stage process seen from the runner: start it, read its progress, tell how it ended, stop
it."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Final

from posttrain.engine.atomic import disk_full, free_space
from posttrain.engine.process import (
    DISK_FULL_STATUS,
    LOG,
    Job,
    SharedLock,
    hidden_main,
    stage_main,
)
from posttrain.engine.work import METRICS, RESULT, Work, read_step

_GRACE_SECONDS: Final = 5.0
"""How long a stage may take to end after SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a stage ended badly."""

    error: str
    exit_code: int = 1
    log: str | None = None
    """Path of the log, None when the error says all (one meant for the user)."""
    last_line: str = ""

    def describe(self, name: str) -> str:
        """The failure for people, over several lines."""
        lines = [f"stage {name} failed: {self.error}"]
        if self.log is not None:
            lines.append(f"  log: {self.log}")
        if self.last_line and self.last_line != self.error:
            lines.append(f"  last line: {self.last_line}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Wait:
    """How a stage ended that needs a file which somebody has yet to fill in."""

    reason: str


@dataclass(kw_only=True)
class Running:
    """A stage process at work."""

    job: Job
    work: Work
    process: ForkServerProcess
    started: float
    resumed: int | None
    """Step it went on from, None for a fresh start."""
    offset: int
    """Bytes of metrics.jsonl read so far."""
    looked: float = 0.0
    """When they were read, on the monotonic clock."""

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.started

    def new_metrics(self) -> Iterator[Mapping[str, Any]]:
        """The lines that metrics.jsonl has gained, parsed; a line that is not a JSON object as
        {"unreadable": text}."""
        self.looked = time.monotonic()
        path = self.work.path / METRICS
        if not path.exists():
            return
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self.offset:
                self.offset = 0  # the stage began the file anew
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self.offset += len(line)
                yield _parse(line)

    def outcome(self) -> Mapping[str, Any] | Failure | Wait:
        """Metrics of a stage that ended well, how it failed, or what it waits for. The process has
        ended."""
        self.process.join()
        # Processes that the stage started may have outlived it.
        _signal_group(self.process, signal.SIGKILL)
        code = self.process.exitcode
        log = self.work.path / LOG
        path = self.work.path / RESULT
        result = json.loads(path.read_bytes()) if path.exists() else {}
        if code == 0 and "metrics" in result:
            metrics: Mapping[str, Any] = result["metrics"]
            return metrics
        if "waiting" in result:
            return Wait(reason=result["waiting"])
        if code == DISK_FULL_STATUS:
            return Failure(
                error=disk_full(self.work.path, "while the stage was working"), exit_code=2
            )
        if "exit_code" in result:
            return Failure(error=result["error"], exit_code=result["exit_code"])
        error = result.get("error") or _death(code, self.work.path)
        return Failure(error=error, log=str(log), last_line=_last_line(log))


def prepare(job: Job, execute: str, work: Work, preload: Sequence[str]) -> Running:
    """The process of a stage, not started yet; it forks from a server that imported `preload`
    once."""
    metrics = work.path / METRICS
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([stage_main.__module__, *preload])
    process = context.Process(
        target=stage_main, args=(job, execute, SharedLock(work.lock)), name=job.name
    )
    return Running(
        job=job,
        work=work,
        process=process,
        started=time.monotonic(),
        resumed=read_step(work.path),
        offset=metrics.stat().st_size if metrics.exists() else 0,
    )


def start(running: Running) -> None:
    """Start the process."""
    with hidden_main():
        running.process.start()


def stop(stages: Collection[Running]) -> None:
    """End stage processes, kindly first, and release their work directories. What they wrote
    stays."""
    begun = [running for running in stages if running.process.pid is not None]
    for running in begun:
        _signal_group(running.process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for running in begun:
        running.process.join(max(0.0, deadline - time.monotonic()))
        _signal_group(running.process, signal.SIGKILL)
        running.process.join()
    for running in stages:
        running.work.release()


def _signal_group(process: ForkServerProcess, number: signal.Signals) -> None:
    """Signal a stage and the processes it started."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    # Right after its start a process is not in its own group yet.
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _death(code: int | None, work: Path) -> str:
    if code is None or code >= 0:
        return (
            f"its process ended with status {code} and left no result "
            f"({free_space(work)} free on the disk)"
        )
    text = f"its process was ended by signal {-code} ({signal.Signals(-code).name})"
    if -code == signal.SIGKILL:
        text += (
            "; if nobody sent it, the system ran out of memory: "
            "run fewer stages at once, or make this one smaller"
        )
    return text


def _last_line(log: Path, tail_bytes: int = 8192) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - tail_bytes))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {"unreadable": line.decode("utf-8", "replace")}
