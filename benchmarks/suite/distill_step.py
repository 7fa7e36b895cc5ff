"""One step of on-policy distillation (sample, score, update) against TRL's DistillationTrainer.

One teacher of the student's size, exact reverse KL over the vocabulary on the student's samples,
mean over tokens, one AdamW step.
"""

from __future__ import annotations

import statistics

from suite import limits, models, ours, peers, workload
from suite.measure import Options, Timed, agreement, interleave, rates
from suite.models import M, S, Size
from suite.rows import Row, compared

STEPS = ((S, 64, 4.0), (M, 8, 3.2))
MICRO_BATCH = {"S": 64, "M": 16}
"""Rows of TRL's forward passes; README.md says what was tried."""


def run(options: Options) -> list[Row]:
    """One row per size."""
    return [one(options, *step) for step in STEPS]


def one(options: Options, size: Size, prompts: int, target: float) -> Row:
    """One size."""
    count = prompts // 4 if options.quick else prompts
    micro_batch = min(MICRO_BATCH[size.name], count * workload.GROUP)
    texts = workload.texts(size, count)
    student = models.save(size, options.folder, seed=1)
    teacher = models.save(size, options.folder, seed=2)
    mine = ours.Distillation(student, {"words": teacher}, group=workload.GROUP)
    problems = mine.problems(texts)
    peer = peers.distillation(
        student, teacher, texts, options.folder, group=workload.GROUP, micro_batch=micro_batch
    )
    name = f"distillation step, {size.name}, {count} prompts x {workload.GROUP}"
    timed = interleave(
        {"ours": lambda i: mine.step(problems, 100 + i), "TRL": peer.step},
        options.repetitions,
        what=name,
    )
    peer.close()
    return compared(
        name,
        "tokens/s",
        rates(timed["ours"]),
        rates(timed["TRL"]),
        peer_name=f"TRL DistillationTrainer, float32, {micro_batch} rows per forward pass",
        target=target,
        limit_share=share(options, size, timed["ours"], count, teacher=True),
        note=agreement(timed["ours"], timed["TRL"]),
    )


def share(
    options: Options, size: Size, series: list[Timed], prompts: int, *, teacher: bool
) -> float:
    """Median share of the limit of whole steps."""
    known = limits.known(options)
    return statistics.median(
        (
            limits.sampling_seconds(known, size, one.work.lengths, prompts)
            + limits.learning_seconds(known, size, one.work.lengths, prompts, teacher=teacher)
        )
        / one.seconds
        for one in series
    )
