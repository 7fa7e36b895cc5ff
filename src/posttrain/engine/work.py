"""The work directory of one stage in progress: its lock, its step checkpoint, what survives a kill.

work/<fp[:12]>/out/            files of the artifact to be
work/<fp[:12]>/stage.json      which stage it is, see `unfinished`
work/<fp[:12]>/metrics.jsonl   one JSON object per line, written by the stage as it goes
work/<fp[:12]>/warnings.jsonl  what the stage has to tell the user, {"text", "about"} per line
work/<fp[:12]>/step.json       {"step": n, ...}: the newest step checkpoint the stage can go on from
work/<fp[:12]>/facts.json      what the stage adds to the provenance of its artifact
work/<fp[:12]>/result.json     how the newest attempt ended, see `process`
work/<fp[:12]>/log.txt         what the stage printed, over all attempts
work/<fp[:12]>/...             the checkpoints themselves, as the stage likes
"""

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.engine.atomic import is_part, remembered, write_whole
from posttrain.engine.errors import StoreError
from posttrain.engine.record import RECORD

CODE_DIFF = "code.diff"
METRICS = "metrics.jsonl"
STEP = "step.json"
RESULT = "result.json"
WARNINGS = "warnings.jsonl"
STAGE = "stage.json"
FACTS = "facts.json"


@dataclass(kw_only=True)
class Work:
    """A work directory that this process holds. `release` lets others have it."""

    path: Path
    lock: int
    """File descriptor of the held lock, -1 once it was released. The lock lives until every process
    that shares it has closed it."""

    @property
    def out(self) -> Path:
        """Where the files of the artifact go."""
        return self.path / "out"

    def release(self) -> None:
        """Let others take this work directory; what is in it stays. A second time does nothing: an
        interrupt may come between a commit and the note of it."""
        held, self.lock = self.lock, -1
        if held < 0:
            return
        # While the lock is held: who gets it next sees that its file is gone (`take_lock`).
        _lock_path(self.path).unlink(missing_ok=True)
        os.close(held)

    def discard(self) -> None:
        """Remove the directory with everything in it, and release it."""
        if self.lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()


def open_work(path: Path, *, wait: bool) -> Work | None:
    """Lock and prepare a work directory; None when another process holds it and `wait` is False."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(path, wait=wait)
    if lock is None:
        return None
    try:
        _prepare(path)
    except BaseException:
        os.close(lock)
        raise
    return Work(path=path, lock=lock)


def take_lock(path: Path, *, wait: bool) -> int | None:
    """The lock of a work directory as a file descriptor; None when it is held elsewhere and `wait`
    is False."""
    lock_path = _lock_path(path)
    while True:
        handle = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        # The last holder removes the file when it is done; a lock on a removed file guards nothing.
        try:
            current = os.stat(lock_path).st_ino
        except FileNotFoundError:
            current = -1
        if current == os.fstat(handle).st_ino:
            return handle
        os.close(handle)


def is_held(path: Path) -> bool:
    """Whether somebody works in a work directory now."""
    try:
        handle = os.open(_lock_path(path), os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared, and for a moment: whoever begins to work just then tries again.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def read_step(path: Path) -> int | None:
    """Step of the newest checkpoint in a work directory, None without one. Raises StoreError when
    it is damaged."""
    step_path = path / STEP
    try:
        return int(json.loads(step_path.read_bytes())["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(
            f'{step_path} is not {{"step": number}} ({error!r}); '
            f"remove {path} to start that stage anew"
        ) from error


def write_step(path: Path, step: int, **facts: Any) -> None:
    """Mark, atomically, that a checkpoint of `step` is complete in the work directory `path`. For
    stages, which may keep `facts` (JSON) beside it."""
    write_whole(path / STEP, json.dumps({"step": step} | facts).encode("ascii"))


def read_warnings(path: Path) -> list[str]:
    """What the stage of a work directory has warned of so far, oldest first."""
    return [line["text"] for line in _warning_lines(path)]


def add_warning(path: Path, text: str, about: str | None = None) -> None:
    """Add a text to the warnings of the stage of a work directory, where none is `about` the same
    (the text itself) yet.

    For stages. The record of what the stage makes has them, and so has whoever runs it.
    """
    lines = _warning_lines(path)
    subject = text if about is None else about
    if all(line["about"] != subject for line in lines):
        lines.append({"text": text, "about": subject})
        # Whole, so that a reader and a kill find no half of a line.
        content = "".join(json.dumps(line) + "\n" for line in lines)
        write_whole(path / WARNINGS, content.encode("ascii"))


def _warning_lines(path: Path) -> list[dict[str, str]]:
    """Those that can be read: a damaged line must not end the run that it is a remark on."""
    try:
        lines = (path / WARNINGS).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and all(
            isinstance(content.get(key), str) for key in ("text", "about")
        ):
            found.append(content)
    return found


def write_facts(path: Path, **facts: Any) -> None:
    """Have these facts (JSON) in the provenance of what a stage makes. For stages, once."""
    write_whole(path / FACTS, json.dumps(facts).encode("ascii"))


def read_facts(path: Path) -> dict[str, Any]:
    """What the stage of a work directory adds to the provenance; {} where it adds nothing."""
    facts = remembered(path / FACTS)
    return facts if isinstance(facts, dict) else {}


def file_state(path: Path | None) -> list[Any] | None:
    """[absolute path, size, time of change in ns] of a file, [path, None, None] where it is not
    there: it tells whether somebody has written it since. None without a path."""
    if path is None:
        return None
    # Unlike Path.exists, false also for a name that the system does not take.
    if not os.path.exists(path):
        return [str(path.absolute()), None, None]
    found = path.stat()
    return [str(path.absolute()), found.st_size, found.st_mtime_ns]


def read_wait(path: Path) -> tuple[str, bool] | None:
    """What the newest attempt in a work directory waits for, and whether that file has changed
    since; None where it does not wait."""
    result = remembered(path / RESULT)
    if not isinstance(result, dict) or "waiting" not in result:
        return None
    state = result.get("file")
    if not isinstance(state, list) or len(state) != 3 or not isinstance(state[0], str):
        return str(result["waiting"]), True
    changed = file_state(Path(state[0])) != state
    return str(result["waiting"]), changed


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _prepare(path: Path) -> None:
    """Leave only what the next attempt goes on from."""
    step = read_step(path)
    out = path / "out"
    (path / RESULT).unlink(missing_ok=True)
    if step is None:
        shutil.rmtree(out, ignore_errors=True)
        (path / METRICS).unlink(missing_ok=True)
        (path / WARNINGS).unlink(missing_ok=True)
    else:
        # Left by a commit that was cut short; the next commit writes its own.
        for name in (RECORD, CODE_DIFF, METRICS):
            (out / name).unlink(missing_ok=True)
        # Left by whoever was killed while it wrote a file: nobody else works here.
        for folder, _, names in os.walk(out):
            for name in filter(is_part, names):
                Path(folder, name).unlink()
        _trim_metrics(path / METRICS, step)
    out.mkdir(parents=True, exist_ok=True)


def _trim_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step` and a line cut off by a kill: those steps are made again."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        write_whole(path, b"".join(kept))


def _step_of(line: bytes) -> float:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return float("inf")
    found = content.get("step", 0) if isinstance(content, dict) else 0
    return found if isinstance(found, int | float) else 0
