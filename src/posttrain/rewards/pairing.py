"""Which responses of a group are compared with which, and the score that their wins come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from posttrain.rewards.penalties import groups


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two rows of a batch in the order in which the judge sees them."""

    a: int
    b: int


def comparisons(group: Sequence[int], *, pairing: str, swap: bool) -> list[Comparison]:
    """The questions about each group; with `swap` each pair is asked in both orders.

    all: every pair. circular: each response with the next and the last with the first; as many
    comparisons as responses (one where there are two).
    """
    found: list[Comparison] = []
    for rows in groups(group):
        pairs = list(combinations(rows, 2))
        if pairing == "circular" and len(rows) > 2:
            pairs = list(zip(rows, [*rows[1:], rows[0]], strict=True))
        for a, b in pairs:
            found.append(Comparison(a=a, b=b))
            if swap:
                found.append(Comparison(a=b, b=a))
    return found


def win_shares(num_rows: int, asked: Sequence[Comparison], wins: Sequence[float]) -> list[float]:
    """Mean of what each row won in its comparisons; 0.5 for a row that was in none.

    `wins[i]` in [0, 1] is what `a` won in comparison i; `b` won the rest.
    """
    total, count = [0.0] * num_rows, [0] * num_rows
    for pair, won in zip(asked, wins, strict=True):
        for row, value in ((pair.a, won), (pair.b, 1 - won)):
            total[row] += value
            count[row] += 1
    return [t / n if n else 0.5 for t, n in zip(total, count, strict=True)]
