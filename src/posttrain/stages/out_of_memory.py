"""A stage that finds no memory ends with words: while doing what, how much it wanted, what takes
how much, and what helps.

torch's own error names a number of bytes and none of the settings that led to it.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import posttrain
from posttrain.backends.budget import Part, Phase, peak
from posttrain.backends.memory import Budget, gibibytes, is_out_of_memory, wanted

SAMPLING, READING, LEARNING = "sampling responses", "reading rows", "taking an optimiser step"
LOADING, LOSS = "loading a model", "computing a loss"
DOING = {
    **dict.fromkeys(("slots", "fused", "cache", "lockstep", "token_sampling"), SAMPLING),
    **dict.fromkeys(("forward", "padded", "packing", "flat", "recompute"), READING),
    **dict.fromkeys(("checkpoint", "checkpoint_source", "scalar", "merging"), LOADING),
    **dict.fromkeys(("precision", "weights", "local_learner", "optimizer"), LEARNING),
}
"""Module of `backends` to what is done there."""
HELPS: dict[str, tuple[str, ...]] = {
    SAMPLING: ("max_new_tokens", "group_size", "k", "n", "samples", "samples_per_prompt"),
    READING: ("max_new_tokens", "batch_size", "prompts_per_step", "group_size"),
    LEARNING: ("batch_size", "prompts_per_step", "group_size", "max_new_tokens"),
    LOSS: ("batch_size", "prompts_per_step", "group_size", "max_new_tokens"),
}
"""Settings that make less of it when they are lowered."""
PHASES: dict[str, tuple[Phase, ...]] = {
    SAMPLING: ("always", "sampling"),
    READING: ("always", "reading", "learning"),
    LEARNING: ("always", "learning"),
    LOSS: ("always", "learning"),
}
"""What is there while it is done; what is always there while a model is loaded."""
TOLD = 6
"""Parts that are named, the largest ones."""


def in_words(
    error: BaseException,
    *,
    stage: str,
    config: Mapping[str, Any],
    device: torch.device,
    parts: Sequence[Part] = (),
) -> str | None:
    """What to tell of an error where it says that there was no memory, else None; `config` are the
    settings of the stage and `parts` what its models take."""
    if not is_out_of_memory(error):
        return None
    doing, size = _doing(error), wanted(error)
    settings = [name for name in HELPS.get(doing, ()) if config.get(name) is not None]
    ways = []
    if doing in HELPS:
        budget = Budget(device)
        said = "set to " if budget.given is not None else ""
        without = "" if said else " without it"
        ways.append(
            f"give --memory (POSTTRAIN_MEMORY) a lower number of bytes ({said}"
            f"{gibibytes(budget.total)}{without}; no part of the stage's identity): fewer rows are "
            "then sampled at once, forward passes have fewer tokens, and gradients are computed "
            "with checkpointing"
        )
    if settings:
        ways.append("lower " + " or ".join(f"{n} ({config[n]})" for n in settings))
    ways += _narrower(config)
    ways.append("run fewer stages at once (--jobs 1), or use a smaller model or more memory")
    return (
        f"stage {stage!r}: out of memory on the {device.type} while {doing}"
        + (f": {size} more could not be had" if size else "")
        + _needed([part for part in parts if part.phase in PHASES.get(doing, ("always",))])
        + "; "
        + "; ".join(ways)
    )


def _needed(parts: Sequence[Part]) -> str:
    """What the parts take, largest first."""
    if not parts:
        return ""
    largest = sorted(parts, key=lambda part: -part.bytes)
    told = [f"{part.what} {gibibytes(part.bytes)}" for part in largest[:TOLD]]
    rest = sum(part.bytes for part in largest[TOLD:])
    told += [f"all else {gibibytes(rest)}"] if rest else []
    return f"; by estimation this takes {gibibytes(peak(parts))}: {', '.join(told)}"


def _narrower(config: Mapping[str, Any]) -> list[str]:
    """Settings of types that halve what something takes, and change the numbers."""
    ways = []
    if config.get("precision") == "float32":
        ways.append('set precision = "bfloat16" where the hardware has it')
    optimizer = config.get("optimizer")
    if isinstance(optimizer, Mapping):
        if optimizer.get("states") == "float32":
            ways.append('set optimizer.states = "int8", for moments of a fourth')
        if optimizer.get("master") == "float32" and config.get("precision") == "bfloat16":
            ways.append('set optimizer.master = "stochastic", for weights of a third')
    return ways


def _doing(error: BaseException) -> str:
    """What the innermost function of this package that says so was doing."""
    root = Path(posttrain.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not path.is_relative_to(root):
            continue
        package, module = path.relative_to(root).parts[0], path.stem
        if package == "losses":
            return LOSS
        if package == "backends" and module in DOING:
            return DOING[module]
    return "working"
