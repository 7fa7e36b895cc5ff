"""Processes that a verifier starts end with it, also those that have left its process group.

A process that forks twice and calls setsid has no parent that could end it. On Linux a worker asks
to become the parent of such orphans, so that all that was started below it is found there. Other
systems have no such call: what a verifier leaves behind there is its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_SET_CHILD_SUBREAPER = 36
ROUNDS = 20
"""Looks for processes that were started while others were being ended."""


def adopt_orphans() -> None:
    """Become the parent of all processes below this one whose own parent ends."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_below(pid: int) -> None:
    """End all processes below one that has called `adopt_orphans`, and not itself."""
    for _ in range(ROUNDS):
        found = _below(pid)
        if not found:
            return
        for child in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)


def _below(pid: int) -> list[int]:
    """Processes that have not ended whose parent, or parent's parent and so on, is `pid`."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in brackets may hold anything; after it come the state and the parent.
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in ("Z", "X"):
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found, left = [], [pid]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found
