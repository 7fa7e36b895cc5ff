"""Whole distillation steps with 1, 4 and 16 teachers on the same prompts, ours alone."""

from __future__ import annotations

import statistics

from suite import models, ours, workload
from suite.measure import Options, Side, Work, interleave, seconds
from suite.models import M, S, Size
from suite.rows import Row

COUNTS = (1, 4, 16)
PROMPTS = {"S": 64, "M": 16}
TARGET = 1.15


def run(options: Options) -> list[Row]:
    """One row per size for whole steps, one for scoring and update alone."""
    return [row for size in (S, M) for row in one(options, size)]


def one(options: Options, size: Size) -> list[Row]:
    """One size: steps with few and many teachers in turn, all from the same weights and seeds."""
    texts = workload.texts(size, PROMPTS[size.name] // (4 if options.quick else 1))
    counts = [count for count in COUNTS if count <= len(texts)]
    stages = {count: stage(options, size, count) for count in counts}

    def whole(count: int) -> Side:
        problems = stages[count].problems(texts)
        return lambda i: stages[count].step(problems, 100 + i)

    def learning(count: int) -> Side:
        batch = stages[count].sample(stages[count].problems(texts), 99)

        def work(_: int) -> Work:
            stages[count].learn(batch)
            return ours.work(batch)

        return work

    rows = []
    for what, side in (("whole step", whole), ("scoring and update alone", learning)):
        repetitions = options.repetitions if what == "whole step" else options.few(3)
        path = f"distillation with 1 to {counts[-1]} teachers, {size.name}, {what}"
        timed = interleave(
            {f"{count} teachers": side(count) for count in counts}, repetitions, what=path
        )
        medians = {name: statistics.median(seconds(series)) for name, series in timed.items()}
        rows.append(
            Row(
                path=path,
                unit="s",
                ours=max(medians.values()),
                ratio=max(medians.values()) / min(medians.values()),
                sense="<=",
                target=TARGET if what == "whole step" else None,
                repetitions=repetitions,
                note="ratio: longest to shortest",
                details={
                    "medians": medians,
                    "tokens": {n: sum(one.work.tokens for one in t) for n, t in timed.items()},
                },
            )
        )
    return rows


def stage(options: Options, size: Size, count: int) -> ours.Distillation:
    """A student with that many different teachers of its size."""
    student = models.save(size, options.folder, seed=1)
    teachers = {
        f"t{number}": models.save(size, options.folder, seed=2 + number) for number in range(count)
    }
    return ours.Distillation(student, teachers, group=workload.GROUP)
