"""Files that a function of the user's own reads although its identity knows nothing of them.

A table that a verifier opens decides its verdicts as its text does. What it declares in
`DATA_FILES` is hashed; any other file of the user's own that it reads is told by name, since a
change of it would go unnoticed. Programs' own files are not looked at: what is installed, what lies
in a directory that begins with a dot, what lies elsewhere on the disk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Where files are looked at."""

    root: str
    """The directory of the user's own files."""
    declared: Sequence[str] = ()
    """Files and directories there that may be read."""

    def to_json(self) -> dict[str, Any]:
        """What `Watched(**...)` takes."""
        return {"root": self.root, "declared": list(self.declared)}


class Watch:
    """Notes what is read below a directory while it is `active`, in this process.

    Python calls what it adds for every file that is opened until the process ends, so there is one
    in a process of a verifier and none anywhere else.
    """

    def __init__(self, watched: Watched) -> None:
        self.root = Path(watched.root).resolve()
        self.opened: list[str] = []
        self._free = [str(Path(path).resolve()) for path in watched.declared] + self._installed()
        self._active = False
        if self.root != Path(self.root.anchor):
            sys.addaudithook(self._note)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Take note of what the code inside reads."""
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _installed(self) -> list[str]:
        """Where modules come from, but for the directory itself and those above it."""
        places = [str(Path(p).resolve()) for p in (*sys.path, sys.prefix, sys.base_prefix) if p]
        return [place for place in places if not self.root.is_relative_to(place)]

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active or event not in ("open", "sqlite3.connect"):
            return
        path, *rest = arguments
        reads = event != "open" or _reads(rest)
        if not reads or not isinstance(path, str | bytes | os.PathLike):
            return
        # What this asks of the file system opens nothing, so it is not called again.
        real = os.path.realpath(os.fsdecode(path))
        below = os.path.relpath(real, self.root)
        hidden = any(part.startswith(".") for part in below.split(os.sep))
        inside = any(real == place or real.startswith(place + os.sep) for place in self._free)
        if hidden or inside or below in self.opened or not os.path.isfile(real):
            return
        if not below.endswith(".pyc"):
            self.opened.append(below)


def _reads(rest: Sequence[Any]) -> bool:
    """Whether a file is opened to be read: the mode and the flags of the event."""
    flags = rest[1] if len(rest) > 1 and isinstance(rest[1], int) else 0
    return flags & (os.O_WRONLY | os.O_RDWR) != os.O_WRONLY


def undeclared(what: str, file: str, opened: Sequence[str]) -> str:
    """The message about files that were read and not declared."""
    shown = ", ".join(repr(path) for path in opened[:5])
    more = f" and {len(opened) - 5} more files" if len(opened) > 5 else ""
    return (
        f"{what}: {file} reads {shown}{more}, which decides what it says and is no part of its "
        f"identity, so a change would go unnoticed. Put it beside {file}, write "
        f'DATA_FILES = ["{Path(opened[0]).name}"] at the top level there, and open it as '
        f'Path(__file__).parent / "{Path(opened[0]).name}"'
    )
