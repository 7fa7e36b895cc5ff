"""Gradient checkpointing: a layer keeps what goes into it and computes its insides again.

The backward pass then needs the insides of one layer at a time, for the time of one more forward
pass. With the same tokens in a pass the numbers are the same, to the last bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

recomputed: Callable[..., Any] = partial(
    # There is no random number in a forward pass that would have to be drawn again.
    checkpoint,
    use_reentrant=False,
    preserve_rng_state=False,
)
"""`recomputed(layer, *inputs)` is `layer(*inputs)`, of which only the inputs are kept."""


@contextmanager
def recomputing(model: Any, wanted: bool = True) -> Iterator[None]:
    """Within it the layers of a transformers model are `recomputed`, if `wanted`.

    transformers' own way needs a model in training mode, that is with dropout. Not for several
    threads with one model.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not wanted:
        layers = []
    try:
        for layer in layers:
            layer.forward = partial(recomputed, layer.forward)
        yield
    finally:
        for layer in layers:
            # What hid the method of the class.
            del layer.forward
