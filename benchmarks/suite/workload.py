"""The same inputs for both sides: prompts, rows of mixed lengths, and a reward."""

from __future__ import annotations

import zlib

import torch

from suite.models import (
    END_ID,
    END_PROBABILITY,
    MAX_NEW_TOKENS,
    PROMPT_TOKENS,
    Size,
    random_words,
    text_of,
)

GROUP = 4
"""Samples per prompt."""


def prompts(size: Size, count: int, *, seed: int = 0) -> list[list[int]]:
    """`count` different prompts of `PROMPT_TOKENS` words."""
    return random_words(size, rows=count, tokens=PROMPT_TOKENS, seed=seed).tolist()


def texts(size: Size, count: int, *, seed: int = 0) -> list[str]:
    """The same prompts as text."""
    return [text_of(ids) for ids in prompts(size, count, seed=seed)]


def mixed_rows(size: Size, count: int, *, seed: int) -> list[list[int]]:
    """Responses of mixed lengths: geometric, at most `MAX_NEW_TOKENS`, the end token included."""
    generator = torch.Generator().manual_seed(seed)
    uniform_B = torch.rand(count, generator=generator, dtype=torch.float64)
    length_B = (uniform_B.log() / torch.log1p(torch.tensor(-END_PROBABILITY))).ceil().clamp(min=2)
    words = random_words(size, rows=count, tokens=MAX_NEW_TOKENS, seed=seed).tolist()
    lengths = length_B.clamp(max=MAX_NEW_TOKENS).int().tolist()
    return [[*row[: length - 1], END_ID] for row, length in zip(words, lengths, strict=True)]


def reward(response: str) -> float:
    """In [0, 1), and hardly ever equal for two responses: a checksum of the text."""
    return (zlib.crc32(response.encode()) % 1000) / 1000
