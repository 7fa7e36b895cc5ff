"""Supervised and preference steps on rows of mixed lengths, against SFTTrainer and DPOTrainer.

What is counted are all real tokens of the rows, prompts included, padding not.
"""

from __future__ import annotations

import statistics

from suite import limits, models, ours, peers, workload
from suite.measure import Options, Side, Timed, interleave, rates
from suite.models import M, S, Size
from suite.rows import Row, compared

TARGET = 1.5
ROWS = {"S": 64, "M": 32}
"""Rows of one optimiser step."""
PADDED = (4, 16)
"""Rows of a padded forward pass of TRL that are tried: fewer waste less on padding."""
FLAT = (4, 8)
"""Rows that TRL lays end to end in a padding-free pass, whose block mask grows with their square.

Without FlashAttention transformers builds that mask from the position ids, so it is correct.
"""
PAIRS = (2, 8)
"""Pairs of a padded forward pass of TRL's DPOTrainer."""


def run(options: Options) -> list[Row]:
    """SFT and DPO for both sizes."""
    rows = []
    for size in (S, M):
        rows += supervised(options, size)
    for size in (S, M):
        rows.append(preference(options, size))
    return rows


def supervised(options: Options, size: Size) -> list[Row]:
    """One row against the fastest setting that keeps a batch's rows as they were drawn, and one
    for information against the setting that makes batches of rows of like length."""
    batch = 16 if options.quick else ROWS[size.name]
    prompts = workload.prompts(size, batch)
    responses = workload.mixed_rows(size, batch, seed=0)
    start = models.save(size, options.folder, seed=1)
    mine = ours.Supervised(start)
    grouped = f"rows sorted by length, {PADDED[1]} per pass"
    settings: dict[str, tuple[int, dict[str, object]]] = {
        **{f"padded, {rows} rows per pass": (rows, {}) for rows in PADDED},
        **{f"padding-free, {rows} rows per pass": (rows, {"padding_free": True}) for rows in FLAT},
        grouped: (PADDED[1], {"train_sampling_strategy": "group_by_length"}),
    }
    steppers = {
        name: peers.supervised(
            start, prompts, responses, options.folder, micro_batch=rows, batch=batch, **more
        )
        for name, (rows, more) in settings.items()
    }
    path = f"SFT, {size.name}, {batch} rows"
    timed = turns(options, path, lambda _: mine.step(prompts, responses), steppers)
    informing = timed.pop(grouped)
    lengths = [len(row) for row in responses]
    share = learning_share(options, size, timed["ours"], lengths, prompts=batch)
    judged = against_fastest(path, "TRL SFTTrainer, float32", timed, share)
    informs = compared(
        f"{path}, TRL's rows sorted by length",
        "tokens/s",
        rates(timed["ours"]),
        rates(informing),
        peer_name=f"TRL SFTTrainer, float32, {grouped}",
        note="for information: in a larger data set this makes the rows of a batch alike",
    )
    return [judged, informs]


def turns(
    options: Options, path: str, mine: Side, steppers: dict[str, peers.Stepper]
) -> dict[str, list[Timed]]:
    """Ours and all trainers in turn; the trainers end with it."""
    sides = {"ours": mine} | {name: stepper.step for name, stepper in steppers.items()}
    timed = interleave(sides, options.repetitions, what=path)
    for stepper in steppers.values():
        stepper.close()
    return timed


def against_fastest(path: str, trainer: str, timed: dict[str, list[Timed]], share: float) -> Row:
    """Ours against the fastest of the others."""
    medians = {name: statistics.median(rates(series)) for name, series in timed.items()}
    fastest = max((name for name in timed if name != "ours"), key=lambda name: medians[name])
    return compared(
        path,
        "tokens/s",
        rates(timed["ours"]),
        rates(timed[fastest]),
        peer_name=f"{trainer}, {fastest}",
        target=TARGET,
        limit_share=share,
        note="the fastest of TRL's settings in details.medians",
        details={"medians": medians},
    )


def learning_share(
    options: Options, size: Size, series: list[Timed], lengths: list[int], *, prompts: int
) -> float:
    """Median share of the limit of learning steps on responses of these lengths."""
    need = limits.learning_seconds(limits.known(options), size, lengths, prompts, teacher=False)
    return need / statistics.median(one.seconds for one in series)


def preference(options: Options, size: Size) -> Row:
    """DPO pairs: a prompt with a chosen and a rejected response of mixed lengths.

    Both sides read the reference once, before what is timed.
    """
    pairs = 8 if options.quick else ROWS[size.name] // 2
    path = f"DPO, {size.name}, {pairs} pairs"
    start = models.save(size, options.folder, seed=1)
    prompts = workload.prompts(size, pairs)
    chosen, rejected = (workload.mixed_rows(size, pairs, seed=seed) for seed in (1, 2))
    mine = ours.Preference(start, prompts, chosen, rejected)
    steppers = {
        f"{rows} pairs per pass": peers.preference(
            start, prompts, chosen, rejected, options.folder, micro_batch=rows
        )
        for rows in PAIRS
    }
    timed = turns(options, path, lambda _: mine.step(), steppers)
    lengths = [len(row) for row in (*chosen, *rejected)]
    share = learning_share(options, size, timed["ours"], lengths, prompts=pairs)
    return against_fastest(path, "TRL DPOTrainer, float32, reference precomputed", timed, share)
