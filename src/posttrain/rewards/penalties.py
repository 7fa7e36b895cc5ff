"""What can be told from a response's text and length alone: costs, and shares to be rewarded.

Plain functions of one response or of one group; no model, no file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def linear(num_tokens: int, *, budget: int) -> float:
    """Tokens above the budget, in budgets: 0 up to it."""
    return max(0, num_tokens - budget) / budget


def over_budget(num_tokens: int, *, budget: int) -> float:
    """1 above the budget, else 0 (Kimi K2, arXiv 2507.20534: a token budget per kind of task)."""
    return float(num_tokens > budget)


def soft_overlong(num_tokens: int, *, budget: int, cache: int) -> float:
    """0 up to budget - cache, rising in a straight line to 1 at the budget, 1 above it.

    Source: DAPO, arXiv 2503.14476, eq. 13, with the sign of a cost.
    """
    return min(1.0, max(0.0, (num_tokens - (budget - cache)) / cache))


def concave(num_tokens: int, *, budget: int, k: float, q: float) -> float:
    """((1 + k x)^(1-q) - 1) / (k (1-q)) with x = tokens / budget; its limit at q = 1.

    A token more costs less the longer the response is: each is to count where tasks are easy, and
    a hard task may take its time. Source: the report on Composer 2, where x also counts calls.
    """
    x = num_tokens / budget
    return math.log1p(k * x) / k if q == 1 else ((1 + k * x) ** (1 - q) - 1) / (k * (1 - q))


def pass_rate(num_tokens: Sequence[int], quality: Sequence[float], *, budget: int) -> list[float]:
    """Tokens / budget, at most 1, times the mean quality of the group, at least 0.

    A problem that the policy does not solve is not to be answered faster. After MAI-Thinking-1,
    whose length penalty grows with the pass rate of the prompt.
    """
    rate = max(0.0, sum(quality) / len(quality))
    return [rate * min(1.0, count / budget) for count in num_tokens]


def group_relative(num_tokens: Sequence[int]) -> list[float]:
    """0 for the shortest response of the group, 1 for the longest, in between by its tokens.

    0 for all where they are equally long. After the group-relative length control of Nemotron 3
    Nano, arXiv 2512.20848.
    """
    low, high = min(num_tokens), max(num_tokens)
    return [(count - low) / (high - low) if high > low else 0.0 for count in num_tokens]


EACH: Mapping[str, Callable[..., float]] = {
    "linear": linear,
    "budget": over_budget,
    "soft_overlong": soft_overlong,
    "concave": concave,
}
"""Shapes of a length penalty that look at one response."""


def length(
    shape: str,
    num_tokens: Sequence[int],
    group: Sequence[int],
    quality: Sequence[float] | None = None,
    **how: Any,
) -> list[float]:
    """The cost of each response under a shape of `judges.length`; `how` are the shape's numbers.

    `group[i]` is the prompt of response i; `quality` is read by the shape pass_rate.
    """
    if shape in EACH:
        return [EACH[shape](count, **how) for count in num_tokens]
    costs = [0.0] * len(num_tokens)
    for rows in groups(group):
        counts = [num_tokens[row] for row in rows]
        if shape == "group_relative":
            found = group_relative(counts)
        else:
            assert quality is not None
            found = pass_rate(counts, [quality[row] for row in rows], **how)
        for row, cost in zip(rows, found, strict=True):
            costs[row] = cost
    return costs


def groups(group: Sequence[int]) -> list[list[int]]:
    """The rows of each group, groups in the order of their first row."""
    found: dict[int, list[int]] = {}
    for row, number in enumerate(group):
        found.setdefault(number, []).append(row)
    return list(found.values())


def language_share(text: str, *, regex: str, unit: str) -> float:
    """Share of the text's words, or characters, that the language has; 1 where it has none.

    `regex` fits one character. A word fits where all of its letters do; digits and punctuation
    belong to every language, so a word of these alone is left out.
    """
    pattern = re.compile(regex)
    words = [[c for c in word if c.isalpha()] for word in text.split()]
    letters = [word for word in words if word]
    if unit == "character":
        letters = [[c] for word in letters for c in word]
    if not letters:
        return 1.0
    return sum(all(map(pattern.fullmatch, word)) for word in letters) / len(letters)


def has_format(text: str, *, pattern: str) -> float:
    """1 where the pattern is found in the text; a dot in it fits line ends too."""
    return float(re.search(pattern, text, re.DOTALL) is not None)


def repeated_share(text: str, *, n: int, unit: str) -> float:
    """Share of the text's n-grams that occurred in it before; 0 where it has fewer than two."""
    pieces: Sequence[str] = text.split() if unit == "word" else text
    grams = [tuple(pieces[i : i + n]) for i in range(len(pieces) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
