"""Scores out of scores: what a combination of judges does with what its parts say.

All lists have one entry per response of the batch; `group[i]` is the prompt of response i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.rewards.penalties import groups

Scores = list[float]
EPSILON = 1e-6
"""Added to a standard deviation; one below it counts as zero, and so does the z-score."""


def weighted_sum(weights: Sequence[float], parts: Sequence[Scores]) -> Scores:
    """The parts' scores, each times its weight, added in their order."""
    rows = zip(*parts, strict=True)
    return [sum(w * score for w, score in zip(weights, row, strict=True)) for row in rows]


def gated(condition: Scores, below: float, then: Scores, otherwise: Scores) -> Scores:
    """Row by row: `then` where the condition is less than `below`, else `otherwise`."""
    rows = zip(condition, then, otherwise, strict=True)
    return [low if value < below else high for value, low, high in rows]


def lexicographic(first: Scores, second: Scores, group: Sequence[int]) -> Scores:
    """`first`, and `first + second` in the groups that `first` scores all alike.

    The advantage of a group is a difference, so what is added to a tied group alone decides there.
    """
    found = list(first)
    for rows in groups(group):
        if max(first[row] for row in rows) - min(first[row] for row in rows) < EPSILON:
            for row in rows:
                found[row] += second[row]
    return found


def z_scores(scores: Scores) -> Scores:
    """(score - mean) / (standard deviation + epsilon), over all rows; 0 where all are alike.

    The standard deviation divides by the number of rows; the whitening of advantages,
    `posttrain.rl.advantage.whitened`, divides by one less.
    """
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    if deviation < EPSILON:
        return [0.0] * len(scores)
    return [(score - mean) / (deviation + EPSILON) for score in scores]


def normalised(parts: Sequence[Scores], group: Sequence[int]) -> Scores:
    """The sum of the parts' z-scores within each group: none outweighs another by its scale.

    Source: GDPO, arXiv 2601.05242; the final normalisation over the batch is the advantage's.
    """
    total = [0.0] * len(group)
    for scores in parts:
        for rows in groups(group):
            for row, z in zip(rows, z_scores([scores[row] for row in rows]), strict=True):
                total[row] += z
    return total
