"""Reproducible numbers: every random choice of a stage follows from its seed and what it is for."""

from __future__ import annotations

import hashlib

import numpy as np


def step_seed(seed: int, step: int) -> int:
    """A seed for one step of one stage, distinct for every pair below 2**31."""
    return (seed << 31) + step


def derived_seed(*words: int) -> int:
    """A seed below 2**62 from several numbers, for what a step samples besides its first batch."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return int(state[0]) >> 2


def named_seed(*words: object) -> int:
    """A seed below 2**56 from words of any kind, joined by slashes: `aux`, the stage's seed and the
    name of the loss, say."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
