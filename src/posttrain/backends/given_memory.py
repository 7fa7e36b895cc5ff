"""How much memory there is, and how much of it a stage may take by what a user said."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path

from posttrain.engine.atomic import human_bytes
from posttrain.engine.errors import ConfigError

MEMORY = "POSTTRAIN_MEMORY"
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where the system says what a container may use."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def given_memory(environment: Mapping[str, str] = os.environ) -> int | None:
    """The bytes that `POSTTRAIN_MEMORY` says, None where it is not there. Raises ConfigError for a
    value that is no number of bytes."""
    text = environment.get(MEMORY, "").strip()
    return memory_size(text, MEMORY) if text else None


def memory_size(text: str, name: str) -> int:
    """A number of bytes such as 500M or 12GB, which are powers of two. Raises ConfigError, with the
    `name` of what was given, for another text."""
    found = re.fullmatch(
        r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE
    )
    size = 0 if found is None else int(float(found[1]) * UNITS[found[2].upper()])
    if size <= 0:
        raise ConfigError(
            f"{name} = {text[:40]!r} is no number of bytes; write one such as 500M or 12G, or "
            "leave it out"
        )
    return size


def size_text(size: int) -> str:
    """A number of bytes as `memory_size` reads it, and in the units of all other sizes: "12G (12.9
    GB)"."""
    for unit in "TGM":
        if size % UNITS[unit] == 0:
            return f"{size // UNITS[unit]}{unit} ({human_bytes(size)})"
    return human_bytes(size)


def machine_memory() -> int:
    """Bytes that this process may use at most: what the machine has, or a limit below that."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        sizes.append(limit)
    for path in map(Path, LIMITS):
        try:
            sizes.append(int(path.read_text()))
        except (OSError, ValueError):
            # Another system, or "max", which is no limit.
            continue
    return min(size for size in sizes if size > 0)
