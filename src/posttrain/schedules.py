"""Values that change within a stage."""

from __future__ import annotations

import math

from posttrain.stages.config import Optimizer


def learning_rate(config: Optimizer, step: int, total: int) -> float:
    """Learning rate of 0-based `step` of `total`: linear warm-up, then the configured shape.

    Warm-up takes at most half of the steps, so that a short stage reaches `lr` too; the last step
    is at `lr * lr_end` (unless the schedule is constant).
    """
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if config.lr_schedule == "constant":
        share = 1.0
    elif config.lr_schedule == "linear":
        share = 1 - (1 - config.lr_end) * progress
    else:
        share = config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * share
