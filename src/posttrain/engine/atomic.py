"""Durable writes: a file is there whole or not at all, and a full disk is a message, not a
traceback."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from posttrain.engine.errors import StoreError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


ONE_FILE_SYSTEM = (
    "a commit is one rename, so the whole store has to be on one. Link or mount the store's own "
    "directory instead of one inside it"
)
_PART = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]{1,10})\.tmp", re.DOTALL)


def remembered(path: Path) -> Any:
    """What a JSON file says that can be had again or done without; None where it is missing or
    damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def guarded(root: Path, doing: str) -> Iterator[None]:
    """Turn "no space" and "not allowed" from the system into a StoreError that says how to go
    on."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreError(disk_full(root, f"while {doing}")) from error
        if error.errno in _FORBIDDEN:
            raise StoreError(
                f"not allowed to write while {doing}: {error.filename or root}: {error.strerror}; "
                f"check the owner and the mount, or choose another store directory"
            ) from error
        if error.errno == errno.EXDEV:
            raise StoreError(
                f"{doing}: {error.filename2 or root} is on another file system than "
                f"{error.filename}; {ONE_FILE_SYSTEM}"
            ) from error
        raise


def disk_full(root: Path, when: str) -> str:
    """The message for a full disk below `root`."""
    return (
        f"disk full {when}: {free_space(root)} free where {root} is. What was there before is "
        f"unchanged. Free some space (`posttrain gc` removes what no recipe needs), then run the "
        f"same command again."
    )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, is the system saying that no space is left.

    Libraries written in other languages raise errors of their own, which carry only its text.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_space(path: Path) -> str:
    """Free bytes of the disk that holds `path` (or its nearest existing parent), for people."""
    while not path.exists():
        path = path.parent
    return human_bytes(shutil.disk_usage(path).free)


def human_bytes(count: int) -> str:
    """A byte count for people, in decimal units.

    >>> human_bytes(1_500_000)
    '1.5 MB'
    """
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{count} B" if unit == "B" else f"{amount:.3g} {unit}"


def fsync(path: Path) -> None:
    """Force a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def part_of(path: Path) -> Path:
    """Where this process writes what is to be `path` when it is whole.

    Beside it: a rename is atomic within one file system. By process, as two may write at once.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_part(name: str) -> bool:
    """Whether a file's name is that of something not whole yet."""
    return _PART.fullmatch(name) is not None


def remove_parts(directory: Path, name: str | None = None) -> None:
    """Remove what processes that are gone left half written in a directory, of `name` or of
    anything. What cannot be removed stays: it is in nobody's way."""
    try:
        found = os.listdir(directory)
    except OSError:
        return
    for entry in found:
        part = _PART.fullmatch(entry)
        if part is None or name not in (None, part["name"]) or _is_alive(int(part["pid"])):
            continue
        path = directory / entry
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a
    part."""
    part = part_of(path)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        # The rename is on the disk when the directory that it changed is.
        with suppress(PermissionError):  # one may write into a directory that one may not list
            fsync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
