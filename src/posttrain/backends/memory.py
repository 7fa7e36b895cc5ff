"""How much memory a stage may take, and what follows from it: rows that are sampled at once, tokens
of a forward pass, and whether layers are computed again for their gradients.

What things take is worked out in `budget.py`. Where rows are few enough or short enough, as in
everything of a few million parameters, the budget decides nothing; where it does, the numbers are
the same up to rounding.

The budget is a fact of the machine and no setting of a stage: `--memory`, which is the variable
`POSTTRAIN_MEMORY` (bytes, or such as 500M or 12G), or else a share of the memory that the process
may ever use. Not of what is free just now: a stage that goes on after a stop is to compute as
before. It is that of one stage: stages that run at once have it each.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from posttrain.backends.budget import (
    CONFIG,
    MIN_TOKENS,
    Part,
    PassPlan,
    Shape,
    laid_out_bytes,
    layer_bytes,
    peak,
    plan_passes,
    row_bytes,
    shape_of,
)
from posttrain.backends.outside.positions import text_config
from posttrain.engine.errors import ConfigError

MEMORY = "POSTTRAIN_MEMORY"
CPU_SHARE, DEVICE_SHARE = 3 / 4, 9 / 10
"""Without that variable a stage may take these shares of the memory of the machine or a device."""
CPU_CACHES, DEVICE_CACHES = 4, 2
"""Of which caches of sampling may be a fourth of the machine's memory, which stages share, or half
of that of a device."""
LEAST_SHARE = 8
"""Where models take all that there is, sampling and reading go on with this part of it."""
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where the system says what a container may use."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SAYS = (
    *("can't allocate memory", "Cannot allocate memory", "out of memory", "bad_alloc"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "not enough memory"),
)
"""What errors of torch and of the system say of it."""


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


def device_memory(device: torch.device) -> int:
    """Bytes of a device, or of the machine: what it has, or a limit below that."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return _machine_memory()


class Budget:
    """What one stage may take on a device, and what its models take of it."""

    def __init__(self, device: torch.device) -> None:
        """Raises ConfigError as `given_memory`."""
        self.device, self.given = device, given_memory()
        self._taken: WeakKeyDictionary[Any, tuple[Part, ...]] = WeakKeyDictionary()

    @property
    def total(self) -> int:
        """Bytes that the stage may take: those given, or a share of what there is."""
        if self.given is not None:
            return self.given
        share = DEVICE_SHARE if self.device.type == "cuda" else CPU_SHARE
        return int(share * device_memory(self.device))

    @property
    def parts(self) -> tuple[Part, ...]:
        """What there is, as far as it was told, each of what `take` was called with last."""
        return tuple(part for parts in self._taken.values() for part in parts)

    def take(self, owner: Any, parts: Sequence[Part]) -> None:
        """Note what `owner` takes from now on, as long as it lives."""
        self._taken[owner] = tuple(parts)

    def for_sampling(self, shape: Shape, precision: str) -> int:
        """Bytes that caches of a sampler may take: what other things leave of a number that was
        given, or a share of what there is."""
        if self.given is None:
            shares = DEVICE_CACHES if self.device.type == "cuda" else CPU_CACHES
            return device_memory(self.device) // shares
        resident = peak(part for part in self.parts if part.phase == "always")
        left = self.given - resident - laid_out_bytes(shape, precision)
        return max(self.given // LEAST_SHARE, left)

    def for_prefill(self) -> int:
        """Bytes that one layer's numbers may take while prompts are read."""
        return self.total // LEAST_SHARE

    def for_learning(self, shape: Shape, precision: str, max_tokens: int) -> PassPlan:
        """How the passes of a learner fit, which has told what it takes itself."""
        return plan_passes(
            shape, self.total, self.parts, precision=precision, max_tokens=max_tokens
        )

    def for_reading(self, shape: Shape, precision: str, max_tokens: int) -> int:
        """Tokens of a pass in which rows are read."""
        fit = self.total // LEAST_SHARE // (2 * layer_bytes(shape, precision))
        return min(max(MIN_TOKENS, fit), max_tokens)


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


def model_shape(model: Any) -> Shape:
    """The shape of a transformers model."""
    config = text_config(model.config)
    # The object knows the usual names of what its file calls otherwise.
    found = {name: getattr(config, name, None) for name in CONFIG}
    if not found["hidden_size"]:
        found["hidden_size"] = model.get_input_embeddings().weight.shape[1]
    found["num_hidden_layers"] = found["num_hidden_layers"] or 1
    return shape_of(found, sum(p.numel() for p in model.parameters()))


def precision_of(model: Any) -> str:
    """The type in which a model computes, such as "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def rows_at_once(model: Any, tokens: int, memory: int) -> int:
    """How many rows of so many tokens fit into `memory` bytes, one at least."""
    return max(1, int(memory // row_bytes(model_shape(model), tokens, precision_of(model))))


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
