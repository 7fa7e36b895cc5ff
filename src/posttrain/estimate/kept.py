"""What estimates found at some cost, remembered for this user on this machine: rates and lengths.

Files of JSON objects in the cache directory. Nothing depends on them but time: one that is missing,
damaged or not writable is done without.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.engine.atomic import remembered, write_whole

FORMAT = 1
"""Raised when something else is kept."""


def directory() -> Path:
    """Where the files are."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "posttrain"


def read(name: str) -> dict[str, Any]:
    """The entries of a file by key; {} where there is none."""
    found = remembered(directory() / name)
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        return {}
    entries = found.get("entries")
    return dict(entries) if isinstance(entries, Mapping) else {}


def keep(name: str, entries: Mapping[str, Any]) -> None:
    """Add entries to a file."""
    content = {"format": FORMAT, "entries": read(name) | dict(entries)}
    try:
        directory().mkdir(parents=True, exist_ok=True)
        write_whole(directory() / name, json.dumps(content, indent=1).encode("ascii"))
    except OSError:
        return


@cache
def machine() -> str:
    """A digest of what makes this machine compute as fast as it does."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = platform.processor()
    # Not the clock of the moment.
    names = ("model name", "model\t", "cache size", "flags")
    lines = sorted({line for line in text.splitlines() if line.startswith(names)})
    said = "\n".join([*lines, platform.node(), str(os.cpu_count())])
    return hashlib.sha256(said.encode()).hexdigest()[:12]
