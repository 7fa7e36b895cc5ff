"""The process of one stage, from inside and from the runner: start it, read its progress, tell how
it ended, stop it.

    runner                                   stage process
    ------                                   -------------
    Job, lock            -- start -->        own process group, output into log.txt,
                                             watchdog on the runner, then execute(job) -> metrics
    metrics.jsonl        <-- lines --        while it works
    result.json          <-- at the end --   {"metrics": ...} or {"error": ..., "exit_code": ...}
                                             or {"waiting": ..., "file": ...}

The runner may be killed at any moment. The watchdog then ends the whole process group at once, and
the lock, shared with the runner, keeps others out of the work directory until this process is gone.
"""

import contextlib
import errno
import faulthandler
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import connection, reduction
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from posttrain.engine.atomic import disk_full, free_space, is_disk_full, remembered, write_whole
from posttrain.engine.errors import ConfigError, PosttrainError, Waiting
from posttrain.engine.fingerprint import plain
from posttrain.engine.inputs import check_inputs
from posttrain.engine.logs import open_bounded, written_up
from posttrain.engine.sockets import use_short_sockets
from posttrain.engine.work import METRICS, RESULT, STAGE, Work, file_state, read_step, read_warnings

LOG: Final = "log.txt"
DISK_FULL_STATUS: Final = errno.ENOSPC
"""Exit status of a stage process that found no space left."""
_LOG_SECONDS: Final = 0.5
"""How long the end of a stage waits for its log."""
_GRACE_SECONDS: Final = 5.0
"""How long a stage may take to end after SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a stage process is told. All values are plain data."""

    name: str
    kind: str
    version: int
    fingerprint: str
    config: Mapping[str, Any]
    """The config of the node as JSON data: tuples are lists."""
    data: Mapping[str, str]
    runtime: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Edge label -> directory of the artifact (files and record.json)."""
    work: str
    """Directory for checkpoints; keep what a resume needs there, and mark it with
    `work.write_step`."""
    out: str
    """Directory for the files of the artifact. Empty at the start of a first attempt."""
    threads: int
    """Share of the processor cores this stage may use."""
    hashes: str
    """File in which the store remembers hashes of files from outside, for `FileHashes`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set in the process before the stage code is imported; the fork server has the older one."""


def note_stage(job: Job, path: Path) -> None:
    """Write into a work directory which stage it is of, for `unfinished`."""
    names = ("name", "kind", "version", "fingerprint", "config", "data", "inputs")
    stage = {name: getattr(job, name) for name in names}
    write_whole(path / STAGE, json.dumps(stage).encode("ascii"))


class SharedLock:
    """A held lock on its way into a stage process: the file descriptor is duplicated when this is
    pickled."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.descriptor)

    def __setstate__(self, duplicate: Any) -> None:
        self.descriptor = duplicate.detach()


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Start processes without importing the program of the user again in each of them.

    multiprocessing prepares `__main__` in every child. A stage is named by module and function, so
    it needs nothing from there; hiding it saves the time, and lets a script without an `if
    __name__` guard, or read from standard input, start stages.
    """
    real = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = real


def stage_main(job: Job, execute: str, lock: SharedLock) -> None:
    """Entry point of a stage process. Ends with status 0 and metrics, or 1 and an error or what it
    waits for, in result.json."""
    # Ctrl-C in a terminal goes to the whole foreground group; only the runner is to act on it.
    os.setsid()
    work = Path(job.work)
    writer = _print_into(work / LOG)
    _end_with_parent()
    os.environ.update(job.environment)
    try:
        check_inputs(job.inputs, Path(job.hashes))
        result = {"metrics": _finite(load(execute)(job), at="metrics")}
    except Waiting as error:
        result = {"waiting": str(error), "file": file_state(error.file)}
    except PosttrainError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    except BaseException as error:
        if is_disk_full(error):
            # There may be no room for a traceback or a result, but a status always gets through.
            os._exit(DISK_FULL_STATUS)
        traceback.print_exc()
        result = {"error": traceback.format_exception_only(error)[-1].strip()}
    try:
        write_whole(work / RESULT, json.dumps(result).encode("ascii"))
    except OSError as error:
        if is_disk_full(error):
            os._exit(DISK_FULL_STATUS)
        raise
    _leave_log(work / LOG, writer)
    if "metrics" not in result:
        sys.exit(1)


def load(execute: str) -> Callable[[Job], Any]:
    """The function named by "package.module:function" or "path/to/file.py:function".

    Raises ConfigError for a text of another form, a file or function that is not there.
    """
    place, _, name = execute.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(
            f'execute: {execute!r} is not "package.module:function" or "path/to/file.py:function"'
        )
    module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"execute: {place} has no function {name!r}")
    loaded: Callable[[Job], Any] = function
    return loaded


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"execute: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up by name while the file is being executed.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _print_into(log: Path) -> int:
    """Send what Python and native code print to the log, line by line; it stays small. Returns the
    process that writes it."""
    handle, writer = open_bounded(log)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    # Only now, so that it writes into the log.
    faulthandler.enable()
    print(f"--- {datetime.now(UTC).isoformat(timespec='seconds')} process {os.getpid()}")
    return writer


def _leave_log(log: Path, writer: int) -> None:
    """Wait for the process that writes the log: nobody else would. What is printed while this
    process ends goes to the file itself. Where something else of the stage may still print, the
    writer is left alone."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        handle = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)
    deadline = time.monotonic() + _LOG_SECONDS
    while time.monotonic() < deadline and os.waitpid(writer, os.WNOHANG) == (0, 0):
        time.sleep(0.001)


def _end_with_parent() -> None:
    # The runner, which made the process, not the fork server that it was forked from.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        # A pipe whose other end closes with the runner, also where that is killed.
        connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _finite(metrics: Any, at: str) -> Any:
    """Metrics as JSON data; a number that is not finite becomes None, for a diverged stage is still
    a result."""
    if isinstance(metrics, Mapping):
        return {key: _finite(value, f"{at}.{key}") for key, value in metrics.items()}
    if isinstance(metrics, float) and not math.isfinite(metrics):
        return None
    if metrics is None and at == "metrics":
        return {}
    return plain(metrics, at=at)


# -- seen from the runner --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a stage ended badly."""

    error: str
    exit_code: int = 1
    log: str | None = None
    """Path of the log, None when the error says all (one meant for the user)."""
    last_line: str = ""

    def reason(self, name: str) -> str:
        """Why, where the stage's name stands before it already."""
        return self.error.removeprefix(f"stage {name!r}: ")

    def describe(self, name: str) -> str:
        """The failure for people, over several lines."""
        lines = [f"stage {name} failed: {self.reason(name)}"]
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
    warned: int = 0
    """How many of the stage's warnings were read so far."""

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

    def new_warnings(self) -> list[str]:
        """The warnings that the stage has added, those of earlier attempts first."""
        found = read_warnings(self.work.path)[self.warned :]
        self.warned += len(found)
        return found

    def outcome(self) -> Mapping[str, Any] | Failure | Wait:
        """Metrics of a stage that ended well, how it failed, or what it waits for. The process has
        ended."""
        self.process.join()
        # Processes that the stage started may have outlived it.
        _signal_group(self.process, signal.SIGKILL)
        code = self.process.exitcode
        log = self.work.path / LOG
        if log.exists():
            written_up(log)
        path = self.work.path / RESULT
        result = _read_result(path)
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
    use_short_sockets()
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
    # An interrupt may come between `prepare` and `start`.
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
            "run fewer stages at once (--jobs), let each take less (--memory), or make this one "
            "smaller"
        )
    return text


_RESULT: Final = {"metrics": dict, "waiting": str, "error": str, "exit_code": int}


def _read_result(path: Path) -> dict[str, Any]:
    """What a stage left; {} where it left nothing, or nothing that it can have written."""
    found = remembered(path)
    whole = isinstance(found, dict) and all(
        isinstance(found[key], kind) for key, kind in _RESULT.items() if key in found
    )
    return found if whole and ("error" in found or "exit_code" not in found) else {}


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
    except (ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {"unreadable": line.decode("utf-8", "replace")}
