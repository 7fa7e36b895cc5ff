"""Sampling: groups of four equal prompts, against `generate` and continuous batching."""

from __future__ import annotations

import statistics
from pathlib import Path

from suite import limits, models, ours, peers, workload
from suite.measure import Options, Side, agreement, interleave, rates
from suite.models import M, S, Size
from suite.rows import Row, compared

TARGETS = {("S", 256): 5.0, ("S", 16): 2.0, ("M", 256): 4.0, ("M", 16): 1.5}


def run(options: Options) -> list[Row]:
    """Two rows per size and batch: `generate` is judged, continuous batching informs."""
    rows = []
    for size, batch in ((S, 256), (S, 16), (M, 256), (M, 16)):
        rows += one(options, size, batch)
    return rows


def one(options: Options, size: Size, batch: int) -> list[Row]:
    """One size and batch."""
    target = TARGETS[size.name, batch]
    batch = 8 if options.quick else batch
    count = batch // workload.GROUP
    prompts = workload.prompts(size, count)
    path = models.save(size, options.folder, seed=1)
    mine, generate = ours.Sampling(path), peers.Generate(path)
    # Small batches take moments and vary most.
    repetitions = options.repetitions * (3 if batch <= 16 and not options.quick else 1)
    sides: dict[str, Side] = {
        "ours": lambda i: mine(some(prompts, i), workload.GROUP, 100 + i),
        "generate": lambda i: generate(some(prompts, i), workload.GROUP, 100 + i),
    }
    name = f"sampling, {size.name}, batch {batch}"
    timed = interleave(sides, repetitions, what=name)
    shares = [
        limits.sampling_seconds(limits.known(options), size, one.work.lengths, count) / one.seconds
        for one in timed["ours"]
    ]
    judged = compared(
        name,
        "tokens/s",
        rates(timed["ours"]),
        rates(timed["generate"]),
        peer_name="transformers generate",
        target=target,
        limit_share=statistics.median(shares),
        note=agreement(timed["ours"], timed["generate"]),
    )
    return [judged, continuous(options, name, size, path, prompts)]


def some(prompts: list[list[int]], repetition: int) -> list[list[int]]:
    """All prompts; four for the warm-up, which would otherwise take as long as a repetition."""
    return prompts if repetition >= 0 else prompts[:4]


def continuous(
    options: Options, name: str, size: Size, path: Path, prompts: list[list[int]]
) -> Row:
    """The same against continuous batching, ours measured beside it."""
    mine, peer = ours.Sampling(path), peers.ContinuousBatching(path)
    try:
        timed = interleave(
            {
                "ours": lambda i: mine(prompts, workload.GROUP, 200 + i),
                "continuous batching": lambda i: peer(prompts, workload.GROUP, 200 + i),
            },
            options.few(1 if size is M and len(prompts) > 4 else 2),
            what=name,
        )
    finally:
        peer.close()
    return compared(
        f"{name}, continuous batching",
        "tokens/s",
        rates(timed["ours"]),
        rates(timed["continuous batching"]),
        peer_name="transformers continuous batching, manager kept, pages of 32 tokens",
        note="for information; " + agreement(timed["ours"], timed["continuous batching"]),
    )
