"""Computing in another type than the one that is trained.

The optimiser keeps its float32 weights and a copy of the model computes: sampling, forward and
backward passes read the same bfloat16 weights, and gradients are added up in float32. These are the
rules of FSDP's mixed precision (`param_dtype` bfloat16, `reduce_dtype` float32).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from posttrain.backends.checkpoint import LanguageModel


def computing_copy(language_model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The model itself if it is of this type, else a copy whose parameters are.

    Buffers keep their type, and so do parameters that transformers keeps in float32 when it loads
    a checkpoint in another type.
    """
    master: Any = language_model.model
    if master.dtype == dtype:
        return language_model
    in_float32 = getattr(master, "_keep_in_fp32_modules_strict", None) or ()
    # What deepcopy is to take for copies already: so there is no second model in float32, and a
    # parameter that is used in two places stays one.
    rounded: dict[int, Any] = {}
    for name, weight in master.named_parameters():
        # With a dot at both ends only whole parts of a name match.
        if not any(f".{part}." in f".{name}." for part in in_float32):
            copied = Parameter(weight.detach(), requires_grad=weight.requires_grad)
            copied.data = weight.detach().to(dtype)
            rounded[id(weight)] = copied
    model = copy.deepcopy(master, rounded)
    model.config.dtype = dtype
    return replace(language_model, model=model)


@torch.no_grad()
def copy_to_compute(copies: Iterable[Tensor], masters: Iterable[Tensor]) -> None:
    """Round the newest weights into the copies; nothing where a copy is its master."""
    for mine, theirs in zip(copies, masters, strict=True):
        if mine is not theirs:
            mine.copy_(theirs)


def accumulate_to_master(copies: Iterable[Tensor], masters: Iterable[Tensor]) -> None:
    """Add the copies' gradients to the masters', in the type of these, and drop them."""
    for mine, theirs in zip(copies, masters, strict=True):
        if mine is theirs or mine.grad is None:
            continue
        if theirs.grad is None:
            theirs.grad = mine.grad.to(theirs.dtype)
        else:
            theirs.grad += mine.grad
        mine.grad = None
