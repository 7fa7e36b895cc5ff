"""The log of a stage stays small: of one that prints without end the middle is left out.

    <what it printed first>
    --- 48120033 bytes are left out here ---
    <what it printed last>

The processes of a stage print into a pipe that they share, and a small process beside them appends
what comes to the file. Whoever prints faster than that waits, so the file is bounded in a burst as
well; and as the process is none of theirs, what they printed before a crash or a kill gets into it.
"""

import contextlib
import fcntl
import os
import re
import signal
import time
from pathlib import Path
from typing import Final

LOG_BYTES: Final = 20_000_000
"""A longer log is cut to half of this: the first and the last quarter."""
_CHUNK: Final = 2**16
"""What a pipe holds."""
_PATIENCE: Final = 2.0
"""Seconds that a log may take to be written up after its stage has ended."""
_MARK_ROOM: Final = 64
_MARK = re.compile(rb"^--- (\d+) bytes are left out here ---\n", re.MULTILINE)


def bound(log: Path, limit: int = LOG_BYTES) -> None:
    """Cut a log that is longer than `limit` bytes."""
    with log.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size <= limit:
            return
        file.seek(0)
        head, gone = file.read(limit // 4), 0
        mark = _MARK.search(head)
        if mark is not None:
            # From an earlier cut, which had left out that much.
            head, gone = head[: mark.start()], int(mark[1]) - (mark.end() - mark.start())
        else:
            # At the end of a line, with room for the mark.
            head = head[:-_MARK_ROOM]
            head = head[: head.rfind(b"\n") + 1] or head
        file.seek(size - limit // 4)
        tail = file.read(limit // 4)
        tail = tail[tail.find(b"\n") + 1 :] or tail
        gone += size - len(head) - len(tail)
        begin = b"" if head.endswith(b"\n") else b"\n"
        # Over what is left out, then cut: a kill in between leaves too much, not too little.
        kept = head + begin + b"--- %d bytes are left out here ---\n" % gone + tail
        file.seek(len(head))
        file.write(kept[len(head) :])
        end = len(kept)
        # What was appended since comes after it, until nothing does.
        while file.seek(0, os.SEEK_END) > size:
            file.seek(size)
            more = file.read()
            file.seek(end)
            file.write(more)
            size, end = size + len(more), end + len(more)
        file.truncate(end)


def open_bounded(log: Path, limit: int = LOG_BYTES) -> tuple[int, int]:
    """A descriptor to print into what is to stand in the log, and the process that writes it there.

    The process ends when nobody has the descriptor any more. To be called before there are threads.
    """
    reading, writing = os.pipe()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    # Of this opening of the file, so it goes on to the process below, and is free when that has
    # ended; see `written_up`. Taken already only while the log of an earlier attempt is written up.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    writer = os.fork()
    if writer == 0:
        try:
            # Apart from its group, which is killed as a whole when the stage ends.
            os.setsid()
            for ignored in (signal.SIGINT, signal.SIGTERM):
                signal.signal(ignored, signal.SIG_IGN)
            os.dup2(reading, 0)
            os.dup2(handle, 1)
            _close_all_from(2)
            _write_up(log, limit)
        finally:
            os._exit(0)
    os.close(reading)
    os.close(handle)
    return writing, writer


def _close_all_from(first: int) -> None:
    """Close all that this process has inherited, such as the lock on the work directory.

    By name: of a limit of a billion open files, as some containers have it, closing each number
    takes minutes, in which nobody reads the pipe; and a limit may be none.
    """
    for name in os.listdir("/dev/fd"):
        # One of them was that of the list itself.
        if int(name) >= first:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _write_up(log: Path, limit: int) -> None:
    """Append to the log, descriptor 1, what comes from descriptor 0, until nobody is there to write
    more."""
    while text := os.read(0, _CHUNK):
        # On a full disk the rest of the log gets lost, and the stage goes on as far as it can.
        with contextlib.suppress(OSError):
            view = memoryview(text)
            while view:
                view = view[os.write(1, view) :]
            if os.fstat(1).st_size > limit:
                bound(log, limit)


def written_up(log: Path) -> None:
    """Wait until the log of a stage that has ended is whole, and bounded; but not for long, for
    something that the stage left behind may still print."""
    deadline = time.monotonic() + _PATIENCE
    with log.open("rb") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.002)
