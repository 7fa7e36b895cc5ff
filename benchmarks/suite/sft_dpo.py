"""Supervised and preference steps on rows of mixed lengths, against SFTTrainer and DPOTrainer.

What is counted are all real tokens of the rows, prompts included, padding not.
"""

from __future__ import annotations

import statistics

from suite import limits, models, ours, peers, workload
from suite.measure import Options, Side, Timed, interleave, rates
from suite.models import M, S, Size
from suite.rows import Row, compared, not_measured

TARGET = 1.5
ROWS = {"S": 64, "M": 32}
"""Rows of one optimiser step."""
PADDED = {"S": 16, "M": 8}
"""Rows of a padded forward pass of TRL: fewer waste less on padding."""
PAIRS = {"S": 8, "M": 4}
"""Pairs of a padded forward pass of TRL's DPOTrainer."""
FLAT = {"S": 8, "M": 8}
"""Rows that TRL lays end to end in a padding-free pass, whose block mask grows with their square.

Without FlashAttention transformers builds that mask from the position ids, so it is correct.
"""


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
    padded, flat = PADDED[size.name], FLAT[size.name]
    steppers = {
        f"padded, {padded} rows per pass": (padded, {}),
        f"padding-free, {flat} rows per pass": (flat, {"padding_free": True}),
        f"grouped by length, {padded} rows per pass": (
            padded,
            {"train_sampling_strategy": "group_by_length"},
        ),
    }
    peer = {
        name: peers.supervised(
            start, prompts, responses, options.folder, micro_batch=rows, batch=batch, **settings
        )
        for name, (rows, settings) in steppers.items()
    }
    sides: dict[str, Side] = {"ours": lambda _: mine.step(prompts, responses)}
    sides |= {name: stepper.step for name, stepper in peer.items()}
    path = f"SFT, {size.name}, {batch} rows"
    timed = interleave(sides, options.repetitions, what=path)
    for stepper in peer.values():
        stepper.close()
    measured = {name: statistics.median(rates(timed[name])) for name in timed}
    grouped = list(peer)[-1]
    fastest = max(list(peer)[:-1], key=lambda name: measured[name])
    lengths = [len(row) for row in responses]
    share = learning_share(options, size, timed["ours"], lengths, prompts=batch)
    judged = compared(
        path,
        "tokens/s",
        rates(timed["ours"]),
        rates(timed[fastest]),
        peer_name=f"TRL SFTTrainer, float32, {fastest}",
        target=TARGET,
        limit_share=share,
        note="the faster of the two settings of TRL that keep the rows of a batch as drawn",
        details={"medians": measured},
    )
    informs = compared(
        f"{path}, TRL's rows sorted by length",
        "tokens/s",
        rates(timed["ours"]),
        rates(timed[grouped]),
        peer_name=f"TRL SFTTrainer, float32, {grouped}",
        note="for information: in a larger data set this makes the rows of a batch alike",
    )
    return [judged, informs]


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
    if not ours.Preference.exists():
        why = "posttrain has no stage for preferences"
        return not_measured(path, "tokens/s", why, target=TARGET)
    start = models.save(size, options.folder, seed=1)
    prompts = workload.prompts(size, pairs)
    chosen, rejected = (workload.mixed_rows(size, pairs, seed=seed) for seed in (1, 2))
    mine = ours.Preference(start, prompts, chosen, rejected)
    micro_batch = min(PAIRS[size.name], pairs)
    peer = peers.preference(
        start, prompts, chosen, rejected, options.folder, micro_batch=micro_batch
    )
    timed = interleave(
        {"ours": lambda _: mine.step(), "TRL": peer.step}, options.repetitions, what=path
    )
    peer.close()
    lengths = [len(row) for row in (*chosen, *rejected)]
    return compared(
        path,
        "tokens/s",
        rates(timed["ours"]),
        rates(timed["TRL"]),
        peer_name=f"TRL DPOTrainer, float32, {micro_batch} pairs per pass, reference precomputed",
        target=TARGET,
        limit_share=learning_share(options, size, timed["ours"], lengths, prompts=pairs),
    )
