"""Values that change within a stage."""

from __future__ import annotations

import math

from posttrain.stages.config import Optimizer


def learning_rate(config: Optimizer, step: int, total: int) -> float:
    """Learning rate of 0-based `step` of `total`: linear warm-up, then the configured shape."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.lr_schedule == "constant":
        share = 1.0
    elif config.lr_schedule == "linear":
        share = 1 - (1 - config.lr_end) * progress
    else:
        share = config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * share
