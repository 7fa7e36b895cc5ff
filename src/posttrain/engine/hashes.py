"""Hashes of large files from outside, remembered by what the file system says about each file.

    {"format": 1, "files": {path: [device, inode, size, mtime_ns, ctime_ns, sha256]}}

A file is hashed again when any of these differs. Two changes within one tick of the clock look the
same, so a file is remembered only if its times were clearly in the past when it was read, as git
does it. Several processes may share the file: each adds what it knows to what it finds there, and
an entry that gets lost costs one more hash. A damaged file counts as empty. `verify` asks nothing
here: it reads the bytes.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from posttrain.engine.atomic import remembered, write_whole
from posttrain.engine.fingerprint import file_digest

HashFile: TypeAlias = Callable[[Path], str]
"""sha256 (64 hex digits) of a file: `fingerprint.file_digest`, or `FileHashes.digest`."""

HASHES: Final = "hashes.json"
REMEMBERED_BYTES: Final = 1_000_000
"""Smaller files are hashed every time: that takes a millisecond or two."""
SETTLED_NS: Final = 3_000_000_000
"""How long before it is read a file must have been left alone. The coarsest clock of a file system
in use (FAT) ticks every two seconds."""

_FORMAT: Final = 1
_State: TypeAlias = tuple[int, ...]
"""device, inode, size, mtime_ns, ctime_ns."""


class FileHashes:
    """The memory in one file, shared by every process that uses the same store."""

    def __init__(self, path: Path) -> None:
        """`path` is read when it is first needed. Nothing is written while its directory is not
        there: then this is the memory of one process, until `write` finds the directory."""
        self._path = path
        self._known: dict[str, tuple[_State, str]] = {}
        self._unwritten = False

    def digest(self, path: Path) -> str:
        """sha256 (64 hex digits) of the bytes of a file, a link followed: remembered or read now.

        Raises OSError for a file that cannot be read.
        """
        place = os.path.realpath(path)
        state = _state(place)
        if state[2] < REMEMBERED_BYTES:
            return file_digest(Path(place))
        if self._known.get(place, ((), ""))[0] != state:
            # Another process may have hashed it in the meantime.
            self._known = {**self._known, **_read(self._path)}
        found = self._known.get(place)
        if found is not None and found[0] == state:
            return found[1]
        began = time.time_ns()
        sha256 = file_digest(Path(place))
        # Left alone for long enough before it was read, and not changed while it was.
        settled = max(state[3], state[4]) < began - SETTLED_NS
        if settled and _state(place) == state:
            self._known[place] = (state, sha256)
            self._unwritten = True
            self.write()
        return sha256

    def places(self, sha256: str) -> list[Path]:
        """Where a file with these bytes was seen; only those of a megabyte or more are known. Ask
        `digest` whether they are still there."""
        known = {**_read(self._path), **self._known}
        return [Path(place) for place, (_, found) in known.items() if found == sha256]

    def write(self) -> None:
        """Put what is new into the file, beside what others put there; entries of files that are
        gone are left out. Does nothing where that is not possible: the hashes can be had again."""
        if not self._unwritten or not self._path.parent.is_dir():
            return
        merged = {**_read(self._path), **self._known}
        files = {
            place: [*state, sha256]
            for place, (state, sha256) in sorted(merged.items())
            if os.path.exists(place)
        }
        try:
            write_whole(self._path, json.dumps({"format": _FORMAT, "files": files}).encode("ascii"))
        except OSError:
            return
        self._unwritten = False


def _state(place: str) -> _State:
    found = os.stat(place)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read(path: Path) -> dict[str, tuple[_State, str]]:
    """What is remembered in the file; nothing where it is missing, damaged or of another format."""
    try:
        content = remembered(path)
        files = content["files"].items() if content["format"] == _FORMAT else ()
        return {place: (tuple(state), sha256) for place, (*state, sha256) in files}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
