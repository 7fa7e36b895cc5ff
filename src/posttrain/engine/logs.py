"""The log of a stage stays small: of one that prints without end the middle is left out.

    <what it printed first>
    --- 48120033 bytes are left out here ---
    <what it printed last>

The processes of a stage append to the file through descriptors that they share, so it can be cut in
place while they go on. What is written between the last look at its end and the cut gets lost.
"""

import os
import re
import threading
from pathlib import Path
from typing import Final

LOG_BYTES: Final = 20_000_000
"""A longer log is cut to half of this: the first and the last quarter."""
_PERIOD: Final = 0.05
"""Seconds between two looks at its size."""
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


def keep_bounded(log: Path, limit: int = LOG_BYTES) -> None:
    """Have a thread of this process cut its log whenever it is longer than `limit` bytes."""

    def watch() -> None:
        while True:
            pause.wait(_PERIOD)
            if log.stat().st_size > limit:
                bound(log, limit)

    pause = threading.Event()
    threading.Thread(target=watch, name="bound-log", daemon=True).start()
