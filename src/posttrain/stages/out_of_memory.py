"""A stage that finds no memory ends with words: while doing what, how much it wanted, what helps.

torch's own error names a number of bytes and none of the settings that led to it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import posttrain
from posttrain.backends.memory import MEMORY, gibibytes, is_out_of_memory, sampling_memory, wanted

SAMPLING, READING, LEARNING = "sampling responses", "reading rows", "taking an optimiser step"
LOADING, LOSS = "loading a model", "computing a loss"
DOING = {
    **dict.fromkeys(("slots", "fused", "cache", "lockstep", "token_sampling"), SAMPLING),
    **dict.fromkeys(("forward", "padded", "packing", "flat"), READING),
    **dict.fromkeys(("checkpoint", "checkpoint_source", "scalar", "merging"), LOADING),
    **dict.fromkeys(("precision", "weights", "local_learner"), LEARNING),
}
"""Module of `backends` to what is done there."""
HELPS: dict[str, tuple[str, ...]] = {
    SAMPLING: ("max_new_tokens", "group_size", "k", "n", "samples", "samples_per_prompt"),
    READING: ("max_new_tokens", "batch_size", "prompts_per_step", "group_size"),
    LEARNING: ("batch_size", "prompts_per_step", "group_size", "max_new_tokens"),
    LOSS: ("batch_size", "prompts_per_step", "group_size", "max_new_tokens"),
}
"""Settings that make less of it when they are lowered."""


def in_words(
    error: BaseException, *, stage: str, config: Mapping[str, Any], device: torch.device
) -> str | None:
    """What to tell of an error where it says that there was no memory, else None; `config` are the
    settings of the stage."""
    if not is_out_of_memory(error):
        return None
    doing, size = _doing(error), wanted(error)
    settings = [name for name in HELPS.get(doing, ()) if config.get(name) is not None]
    ways = []
    if doing == SAMPLING:
        budget = gibibytes(sampling_memory(device))
        said = f"set to {budget}" if os.environ.get(MEMORY) else f"{budget} without it"
        ways.append(
            f"give {MEMORY} a lower number of bytes, so that fewer rows are sampled at once ({said}"
            "; no part of the stage's identity)"
        )
    if settings:
        ways.append("lower " + " or ".join(f"{n} ({config[n]})" for n in settings))
    if config.get("precision") == "float32":
        ways.append('set precision = "bfloat16" where the hardware has it')
    ways.append("run fewer stages at once (--jobs 1), or use a smaller model or more memory")
    return (
        f"stage {stage!r}: out of memory on the {device.type} while {doing}"
        + (f": {size} more could not be had" if size else "")
        + "; "
        + "; ".join(ways)
    )


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
