"""What runs inside the process of one stage, and what goes in and out of it.

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
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import connection, reduction
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from posttrain.engine.atomic import is_disk_full, write_whole
from posttrain.engine.errors import ConfigError, PosttrainError, Waiting
from posttrain.engine.fingerprint import plain
from posttrain.engine.work import RESULT, file_state

LOG: Final = "log.txt"
DISK_FULL_STATUS: Final = errno.ENOSPC
"""Exit status of a stage process that found no space left."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a stage process is told. All values are plain data."""

    name: str
    kind: str
    version: int
    fingerprint: str
    config: Mapping[str, Any]
    """The config of the node as JSON data: tuples are lists, dataclasses dicts."""
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
    _print_into(work / LOG)
    _end_with_parent()
    os.environ.update(job.environment)
    try:
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
    write_whole(work / RESULT, json.dumps(result).encode("ascii"))
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
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _print_into(log: Path) -> None:
    """Send what Python and native code print to the log, line by line."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    faulthandler.enable()
    print(f"--- {datetime.now(UTC).isoformat(timespec='seconds')} process {os.getpid()}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
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
