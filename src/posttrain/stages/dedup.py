"""Data without repeats: equal texts, or texts that share most of their n-grams.

Near duplicates are found exactly. Two sets with Jaccard similarity t share at least one of the
rarest |A| - ceil(t |A|) + 1 grams of each (prefix filtering: Chaudhuri and others, ICDE 2006), so
only rows that share such a gram are compared.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from posttrain.algorithms import Near
from posttrain.engine.jsonl import read_jsonl, write_jsonl
from posttrain.stages.rows import edges
from posttrain.stages.settings.data import Dedup

if TYPE_CHECKING:  # it imports torch
    from posttrain.stages.context import Context

FIELDS = {"row": ("prompt", "demo"), "prompt": ("prompt",), "demo": ("demo",)}


def run(settings: Dedup, ctx: Context) -> dict[str, float]:
    """Write data.jsonl: of rows that count as the same the first one, in their order."""
    rows = [row for path in edges(ctx, "data") for row in read_jsonl(path / "data.jsonl")]
    texts = ["\n".join(row[field] for field in FIELDS[settings.of]) for row in rows]
    # The answer to one prompt in two modes is two things to learn.
    marks = ["" if settings.of == "prompt" else str(row.get("mode")) for row in rows]
    first = first_of_each(list(zip(marks, texts, strict=True)))
    if settings.near is not None:
        by_mark: dict[str, list[int]] = {}
        for position in first:
            by_mark.setdefault(marks[position], []).append(position)
        first = sorted(
            positions[i]
            for positions in by_mark.values()
            for i in first_of_similar([texts[p] for p in positions], settings.near)
        )
    write_jsonl(ctx.out / "data.jsonl", (rows[i] for i in first))
    return {"rows": len(first), "kept_share": len(first) / len(rows)}


def first_of_each(keys: list[tuple[str, str]]) -> list[int]:
    """Positions of the first of equal keys."""
    found: dict[tuple[str, str], int] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, position)
    return list(found.values())


def grams(text: str, n: int) -> frozenset[str]:
    """The n-grams of characters; the text itself where it is shorter."""
    return frozenset(text[i : i + n] for i in range(max(1, len(text) - n + 1)))


def first_of_similar(texts: list[str], near: Near) -> list[int]:
    """Positions of the texts that are less like every such text before them than `near` says."""
    sets = [grams(text, near.ngram) for text in texts]
    frequency = Counter(gram for found in sets for gram in found)
    first: list[int] = []
    holders: dict[str, list[int]] = {}
    for position, found in enumerate(sets):
        rarest = sorted(found, key=lambda gram: (frequency[gram], gram))
        prefix = rarest[: len(found) - math.ceil(near.similarity * len(found) - 1e-9) + 1]
        candidates = {other for gram in prefix for other in holders.get(gram, ())}
        if any(jaccard(found, sets[other]) >= near.similarity for other in candidates):
            continue
        first.append(position)
        for gram in prefix:
            holders.setdefault(gram, []).append(position)
    return first


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Size of the intersection over that of the union."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
