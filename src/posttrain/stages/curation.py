"""Data curation: prompts by how hard they are, data in given shares, and data without repeats.

Near duplicates are found exactly. Two sets with Jaccard similarity t share at least one of the
rarest |A| - ceil(t |A|) + 1 grams of each (prefix filtering: Chaudhuri and others, ICDE 2006), so
only rows that share such a gram are compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from transformers import AutoTokenizer

from posttrain.algorithms import Near
from posttrain.backends.prompting import Problem, learned_rows, shown_text
from posttrain.backends.token_ids import tokens_digest
from posttrain.engine.errors import ConfigError
from posttrain.engine.exact import difference, rounded_up
from posttrain.engine.jsonl import read_jsonl, write_jsonl
from posttrain.stages.context import Context
from posttrain.stages.data import Pool
from posttrain.stages.rows import Key, Row, edges, key_of, pick
from posttrain.stages.sampled_ids import names
from posttrain.stages.settings.data import Dedup, Filter, Mix, Part
from posttrain.stages.signs import few_kept
from posttrain.stages.supervised import demonstrated

Rates = Mapping[Key, float]

POOL = "mix"
"""What rows of a mix have as `pool`: they are drawn as they stand, not evenly over domains."""

FIELDS = {"row": ("prompt", "demo"), "prompt": ("prompt",), "demo": ("demo",)}
"""What `dedup` compares."""


def run_filter(settings: Filter, ctx: Context) -> dict[str, float]:
    """Write prompts.jsonl, whole problem rows, of the training problems that both profiles know."""
    chosen: list[Problem] = []
    known, total = 0, 0
    problems_of = {name: ctx.problems(name, "train", settings.modes) for name in ctx.domains}
    everything = [problem for problems in problems_of.values() for problem in problems]
    rates, others = (
        across_modes(read_rates(ctx, edge), everything) for edge in ("profile", "against")
    )
    for name, problems in problems_of.items():
        profiled = [
            problem
            for problem in problems
            if key_of(problem) in rates and (not others or key_of(problem) in others)
        ]
        if not profiled:
            raise ConfigError(
                f"stage {ctx.name!r}: no profile has a problem of domain {name!r} among its "
                f"{len(problems)} prompts; profile the same prompts as are filtered"
            )
        chosen_here = choose(settings, profiled, rates, others)
        if not chosen_here:
            raise ConfigError(
                f"stage {ctx.name!r}: none of {len(profiled)} prompts of domain {name!r} is kept; "
                f"their pass rates are {min(rates[key_of(p)] for p in profiled):.3g} to "
                f"{max(rates[key_of(p)] for p in profiled):.3g}; widen the band, or give at_least"
            )
        fix = "widen the band, or give at_least"
        few_kept(ctx, len(chosen_here), len(profiled), f"prompts of domain {name!r}", fix)
        chosen += chosen_here
        known, total = known + len(profiled), total + len(problems)
    write_jsonl(ctx.out / "prompts.jsonl", chosen)
    return {
        "rows": len(chosen),
        "kept_share": len(chosen) / total,
        "profiled_share": known / total,
        "rate": sum(rates[key_of(problem)] for problem in chosen) / len(chosen),
    }


def read_rates(ctx: Context, edge: str) -> dict[Key, float]:
    """The pass rates of the profile of an edge; none where there is no such edge."""
    if edge not in ctx.inputs:
        return {}
    return {key_of(row): row["rate"] for row in read_jsonl(ctx.inputs[edge] / "profile.jsonl")}


def across_modes(rates: Rates, problems: Sequence[Problem]) -> Rates:
    """The same rates, where those of a single mode also stand for the other mode of a problem.

    So prompts to think about can be those that are not solved without a thought (Qwen3).
    """
    modes = {mode for _, _, mode in rates}
    if len(modes) != 1 or modes == {None}:
        return rates
    (mode,) = modes
    found = {key_of(p): rates.get((p["domain"], p["id"], mode)) for p in problems}
    return {**rates, **{key: rate for key, rate in found.items() if rate is not None}}


def choose(
    settings: Filter, problems: Sequence[Problem], rates: Rates, others: Rates
) -> list[Problem]:
    """The problems of one domain that stay, in their order; `others` may be empty."""
    distances = []
    for problem in problems:
        key = key_of(problem)
        far = distance(settings, rates[key], others.get(key))
        if rates[key] == 0 and settings.keep_unsolved is not None:
            far = 0.0 if draw(settings.seed, key) < settings.keep_unsolved else 1.0
        distances.append(far)
    # Python sorts stably: of equal distances the first prompts come back.
    nearest = sorted(range(len(problems)), key=lambda i: distances[i])
    back = set(nearest[: settings.at_least])
    return [p for i, p in enumerate(problems) if distances[i] == 0 or i in back]


def distance(settings: Filter, rate: float, other: float | None) -> float:
    """How far a problem is from what is asked for, a sum over the conditions; 0 where it fits."""
    far = outside(rate, settings.low, settings.high)
    if other is not None:
        far += outside(other, settings.against_low, settings.against_high)
        if settings.min_gain is not None:
            far += max(0.0, settings.min_gain - difference(rate, other))
    return far


def outside(value: float, low: float, high: float) -> float:
    """Distance from `value` to the interval from `low` to `high`; 0 within."""
    return max(0.0, low - value, value - high)


def draw(seed: int, key: Key) -> float:
    """A number in [0, 1) that depends on the seed and the problem alone."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def run_mix(settings: Mix, ctx: Context) -> dict[str, float]:
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
    # Each part in a fresh order on every pass.
    pool = Pool({str(n): rows for n, rows in enumerate(parts)}, seed=settings.seed)
    mixed = [
        pool.at(number, str(number), index)
        for number, share in enumerate(counts)
        for index in range(share)
    ]
    order = np.random.default_rng([settings.seed, len(parts)]).permutation(len(mixed))
    write_jsonl(ctx.out / "data.jsonl", (mixed[int(i)] | {"pool": POOL} for i in order))
    if settings.rows is None:
        available = sum(map(len, parts))
        fix = "the smallest source for its weight decides; give it less weight, or give rows"
        few_kept(ctx, len(mixed), available, "rows of its sources", fix)
    repeats = max(number / len(rows) for number, rows in zip(counts, parts, strict=True))
    used = sum(number / len(rows) >= 1 for number, rows in zip(counts, parts, strict=True))
    return {"rows": len(mixed), "most_passes": repeats, "parts_used_up": used}


def part_rows(part: Part, ctx: Context, seed: int) -> list[Row]:
    """All rows of a source. Raises ConfigError where it has none, or no demonstrations."""
    if part.edge is not None:
        rows = learned_rows(read_jsonl(ctx.inputs[part.edge] / "data.jsonl"))
        if not rows:
            raise ConfigError(f"stage {ctx.name!r}: its source {part.edge} has no rows")
        return rows
    found = demonstrated(ctx, part.domains, modes=part.modes, noise=part.demo_noise, seed=seed)
    fields = ("id", "domain", "prompt", "demo", "mode", "messages")
    return [pick(problem, *fields) for problems in found.values() for problem in problems]


def token_counter(ctx: Context) -> Callable[[Row], int]:
    """Tokens of a row's demonstration, its end included, by the tokenizer of the edge `tokenizer`.

    Those that were sampled, where the tokenizer sampled them; else its end is counted as one token.
    """
    tokenizer = AutoTokenizer.from_pretrained(ctx.inputs["tokenizer"], trust_remote_code=False)
    digest, (ids, of) = tokens_digest(tokenizer), names("demo")

    def size(row: Row) -> int:
        if row.get(of) == digest:
            return len(row[ids])
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


def run_dedup(settings: Dedup, ctx: Context) -> dict[str, float]:
    """Write data.jsonl: of rows that count as the same the first one, in their order."""
    paths = [path / "data.jsonl" for path in edges(ctx, "data")]
    rows = learned_rows(row for path in paths for row in read_jsonl(path))
    if not rows:
        raise ConfigError(f"stage {ctx.name!r} (dedup): its data has no rows")
    texts = ["\n".join(compared(row, field) for field in FIELDS[settings.of]) for row in rows]
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
    few_kept(ctx, len(first), len(rows), "rows", f"check what repeats (of = {settings.of!r})")
    write_jsonl(ctx.out / "data.jsonl", (rows[i] for i in first))
    return {"rows": len(first), "kept_share": len(first) / len(rows)}


def compared(row: Row, field: str) -> str:
    """What `dedup` reads of a row; a prompt is all that the model is shown."""
    return shown_text(row) if field == "prompt" else str(row[field] or "")


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
        # Prefix filtering: two sets that are so much alike share one of the rarest grams of each.
        prefix = rarest[: len(found) - rounded_up(near.similarity, len(found)) + 1]
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
