"""How much memory sampling may take, and so how many rows are sampled at once.

What a row takes is its keys and values, at the length that it may reach. Where rows are few enough
or short enough, as in everything of a few million parameters, the budget decides nothing; where it
does, fewer rows at a time give the same responses up to rounding.

The budget is a fact of the machine and no setting of a stage: `POSTTRAIN_MEMORY` (bytes, or such as
500M or 12G), or else a share of the memory that the process may ever use. Not of what is free just
now: a stage that goes on after a stop is to sample as many rows at a time as before.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from posttrain.backends.outside.positions import text_config
from posttrain.engine.errors import ConfigError

MEMORY = "POSTTRAIN_MEMORY"
CPU_SHARE, DEVICE_SHARE = 4, 2
"""Without that variable sampling may take a fourth of the memory of the machine, which stages
share, or half of that of a device."""
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where the system says what a container may use."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
LOGITS_BYTES = 24
"""For each token of the vocabulary while one is drawn: logits and log-probabilities in float32,
probabilities and their sums in float64."""
GROWING = 1.5
"""While a cache grows to its double both stand in memory."""

_SAYS = (
    *("can't allocate memory", "Cannot allocate memory", "out of memory", "bad_alloc"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "not enough memory"),
)
"""What errors of torch and of the system say of it."""


def given_memory(environment: Mapping[str, str] = os.environ) -> int | None:
    """The bytes that `POSTTRAIN_MEMORY` says, None where it is not there. Raises ConfigError for a
    value that is no number of bytes."""
    text = environment.get(MEMORY, "").strip()
    if not text:
        return None
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    size = 0 if found is None else int(float(found[1]) * UNITS[found[2].upper()])
    if size <= 0:
        raise ConfigError(
            f"{MEMORY} = {text[:40]!r} is no number of bytes; write one such as 500M or 12G, or "
            "leave the variable out"
        )
    return size


def sampling_memory(device: torch.device) -> int:
    """Bytes that caches of sampling may take on a device. Raises as `given_memory`."""
    given = given_memory()
    if given is not None:
        return given
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1]) // DEVICE_SHARE
    return _machine_memory() // CPU_SHARE


def _machine_memory() -> int:
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


def rows_at_once(model: Any, tokens: int, memory: int) -> int:
    """How many rows of so many tokens fit into `memory` bytes, one at least."""
    weight_VD = model.get_output_embeddings().weight
    row = GROWING * cache_bytes(model, tokens) + LOGITS_BYTES * len(weight_VD)
    return max(1, int(memory // row))


def cache_bytes(model: Any, tokens: int) -> int:
    """Bytes of the keys and values of a row of so many tokens, by the model's config.

    Recurrent states do not grow with a row and are left out.
    """
    config = text_config(model.config)
    heads = getattr(config, "num_attention_heads", 0)
    keys = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    window = getattr(config, "sliding_window", None) or tokens
    kinds = getattr(config, "layer_types", None)
    kinds = kinds or ["full_attention"] * getattr(config, "num_hidden_layers", 0)
    lengths = {"full_attention": tokens, "sliding_attention": min(window, tokens)}
    positions = sum(lengths.get(kind, 0) for kind in kinds)
    size: int = model.get_output_embeddings().weight.element_size()
    return 2 * positions * keys * width * size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory, whoever raised it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(s in str(error) for s in _SAYS)


def wanted(error: BaseException) -> str:
    """How much could not be had, as far as the error says it, such as "8.0 GiB"."""
    found = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    if found is None:
        return ""
    return gibibytes(int(found[1])) if found[2] == "bytes" else f"{found[1]} {found[2]}"


def gibibytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
