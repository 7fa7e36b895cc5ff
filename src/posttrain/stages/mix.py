"""Data of several sources in given shares of rows or of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np

from posttrain.engine.errors import ConfigError
from posttrain.engine.jsonl import read_jsonl, write_jsonl
from posttrain.stages.rows import Row, pick
from posttrain.stages.settings.data import Mix, Part

if TYPE_CHECKING:  # it imports torch
    from posttrain.stages.context import Context

POOL = "mix"
"""What rows of a mix have as `pool`: they are drawn as they stand, not evenly over domains."""


def run(settings: Mix, ctx: Context) -> dict[str, float]:
    """Write data.jsonl: rows of all parts, shuffled, in the shares of their weights."""
    parts = [part_rows(part, ctx, settings.seed) for part in settings.parts]
    total = sum(part.weight for part in settings.parts)
    shares = [part.weight / total for part in settings.parts]
    size = token_counter(ctx) if settings.by == "tokens" else lambda row: 1
    sizes = [float(np.mean([size(row) for row in rows])) for rows in parts]
    counts = row_counts(settings.rows, shares, sizes, [len(rows) for rows in parts])
    for part, number in zip(settings.parts, counts, strict=True):
        if number == 0:
            raise ConfigError(
                f"stage {ctx.name!r}: {part.edge or ', '.join(part.domains)} has so small a weight "
                f"({part.weight:g} of {total:g}) that none of its rows would be in the mix; raise "
                "rows, or leave it out"
            )
    mixed = [
        row
        for number, (rows, share) in enumerate(zip(parts, counts, strict=True))
        for row in islice(passes(rows, settings.seed, number), share)
    ]
    order = np.random.default_rng([settings.seed, len(parts)]).permutation(len(mixed))
    write_jsonl(ctx.out / "data.jsonl", (mixed[int(i)] | {"pool": POOL} for i in order))
    repeats = max(number / len(rows) for number, rows in zip(counts, parts, strict=True))
    used = sum(number / len(rows) >= 1 for number, rows in zip(counts, parts, strict=True))
    return {"rows": len(mixed), "most_passes": repeats, "parts_used_up": used}


def part_rows(part: Part, ctx: Context, seed: int) -> list[Row]:
    """All rows of a source. Raises ConfigError where it has none, or no demonstrations."""
    if part.edge is not None:
        rows = list(read_jsonl(ctx.inputs[part.edge] / "data.jsonl"))
        if not rows:
            raise ConfigError(f"stage {ctx.name!r}: its source {part.edge} has no rows")
        return rows
    from posttrain.stages.supervised import demonstrated

    found = demonstrated(ctx, part.domains, modes=part.modes, noise=part.demo_noise, seed=seed)
    fields = ("id", "domain", "prompt", "demo", "mode")
    return [pick(problem, *fields) for problems in found.values() for problem in problems]


def token_counter(ctx: Context) -> Callable[[Row], int]:
    """Tokens of a row's demonstration, its end included, by the tokenizer of the edge `tokenizer`.

    Its end is counted as one token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ctx.inputs["tokenizer"], trust_remote_code=False)

    def size(row: Row) -> int:
        return len(tokenizer(row["demo"], add_special_tokens=False)["input_ids"]) + 1

    return size


def row_counts(
    rows: int | None, shares: list[float], sizes: list[float], available: list[int]
) -> list[int]:
    """How many rows of each source a mix has.

    `shares` are of the total size and add up to 1, `sizes` the mean size of a source's rows. With
    `rows`, so many in all; without, as many as there are with no source used twice.
    """
    per_size = [share / size for share, size in zip(shares, sizes, strict=True)]
    if rows is None:
        scale = min(has / weight for has, weight in zip(available, per_size, strict=True))
        return [int(scale * weight + 1e-9) for weight in per_size]
    exact = [rows * weight / sum(per_size) for weight in per_size]
    counts = [int(value + 1e-9) for value in exact]
    # What rounding down left over goes to those that lost most.
    lost = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in lost[: rows - sum(counts)]:
        counts[i] += 1
    return counts


def passes(rows: list[Row], seed: int, number: int) -> Iterator[Row]:
    """The rows in a fresh order on every pass, without end."""
    for epoch in count():
        generator = np.random.default_rng([seed, number, epoch])
        for i in generator.permutation(len(rows)):
            yield rows[int(i)]
