"""Data without repeats: equal texts, or texts that share most of their n-grams.

Near duplicates are found exactly. Two sets with Jaccard similarity t share at least one of the
rarest |A| - ceil(t |A|) + 1 grams of each (prefix filtering: Chaudhuri and others, ICDE 2006), so
only rows that share such a gram are compared.
"""

from __future__ import annotations

import math
from collections import Counter

from posttrain.stages.context import Context
from posttrain.stages.rollouts import write_jsonl
from posttrain.stages.rows import Row, edges, read_rows
from posttrain.stages.settings.data import Dedup

FIELDS = {"row": ("prompt", "demo"), "prompt": ("prompt",), "demo": ("demo",)}


def run(config: Dedup, ctx: Context) -> dict[str, float]:
    """Write data.jsonl: of rows that count as the same the first one, in their order."""
    rows = [row for path in edges(ctx, "data") for row in read_rows(path / "data.jsonl")]
    texts = ["\n".join(row[field] for field in FIELDS[config.of]) for row in rows]
    # The answer to one prompt in two modes is two things to learn.
    marks = ["" if config.of == "prompt" else str(row.get("mode")) for row in rows]
    first = first_of_each(list(zip(marks, texts, strict=True)))
    if config.near is not None:
        first = sorted(
            [i for mark in set(marks) for i in _similar(config, mark, marks, texts, first)]
        )
    kept: list[Row] = [rows[i] for i in first]
    write_jsonl(ctx.out / "data.jsonl", kept)
    return {"rows": len(kept), "kept_share": len(kept) / len(rows)}


def _similar(
    config: Dedup, mark: str, marks: list[str], texts: list[str], first: list[int]
) -> list[int]:
    of_mark = [i for i in first if marks[i] == mark]
    assert config.near is not None
    found = first_of_similar([texts[i] for i in of_mark], config.near, config.ngram)
    return [of_mark[i] for i in found]


def first_of_each(keys: list[tuple[str, str]]) -> list[int]:
    """Positions of the first of equal keys."""
    found: dict[tuple[str, str], int] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, position)
    return list(found.values())


def grams(text: str, n: int) -> frozenset[str]:
    """The n-grams of characters; the text itself where it is shorter."""
    return frozenset(text[i : i + n] for i in range(max(1, len(text) - n + 1)))


def first_of_similar(texts: list[str], near: float, n: int) -> list[int]:
    """Positions of the texts whose similarity to every kept text before them is below `near`."""
    sets = [grams(text, n) for text in texts]
    frequency = Counter(gram for found in sets for gram in found)
    kept: list[int] = []
    holders: dict[str, list[int]] = {}
    for position, found in enumerate(sets):
        rarest = sorted(found, key=lambda gram: (frequency[gram], gram))
        prefix = rarest[: len(found) - math.ceil(near * len(found) - 1e-9) + 1]
        candidates = {other for gram in prefix for other in holders.get(gram, ())}
        if any(jaccard(found, sets[other]) >= near for other in candidates):
            continue
        kept.append(position)
        for gram in prefix:
            holders.setdefault(gram, []).append(position)
    return kept


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Size of the intersection over that of the union."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
