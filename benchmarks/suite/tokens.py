"""Positions that scoring and learning compute, against those that they had to.

What has to be computed is every prompt once per group and every response token but the last, once
in the teacher and once in the student. What is computed is counted where tokens enter a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from suite import limits, models, ours, workload
from suite.measure import Options
from suite.models import M, S, Size
from suite.rows import Row

PROMPTS = {"S": 64, "M": 8}
TARGET = 1.10


def run(options: Options) -> list[Row]:
    """Distillation and GRPO for both sizes."""
    rows = []
    for size in (S, M):
        texts = workload.texts(size, PROMPTS[size.name])
        student = models.save(size, options.folder, seed=1)
        teacher = models.save(size, options.folder, seed=2)
        distillation = ours.Distillation(student, {"words": teacher}, group=workload.GROUP)
        batch = distillation.sample(distillation.problems(texts), 100)
        rows.append(
            row("distillation", size, batch, distillation.learn, distillation.models(), passes=2)
        )
        grpo = ours.Grpo(student, workload.reward, group=workload.GROUP)
        batch = grpo.sample(texts, 100)
        rows.append(row("GRPO", size, batch, grpo.learn, grpo.models(), passes=1))
    return rows


def row(
    what: str,
    size: Size,
    batch: Any,
    learn: Callable[[Any], object],
    language_models: list[Any],
    *,
    passes: int,
) -> Row:
    """Positions of one call of `learn`; `passes` is how many models have to read everything."""
    lengths = ours.work(batch).lengths
    prompts = len(lengths) // workload.GROUP
    needed, _ = limits.tree(lengths, prompts)
    with counting(language_models) as positions:
        learn(batch)
    computed = sum(positions)
    if computed < needed * passes:
        raise RuntimeError(
            f"{what}, {size.name}: {computed} positions were seen where {needed * passes} are "
            "needed: tokens enter a model by another way than its embedding layer"
        )
    return Row(
        path=f"tokens computed against needed, {what}, {size.name}",
        unit="positions",
        ours=computed,
        ratio=computed / (needed * passes),
        sense="<=",
        target=TARGET,
        repetitions=1,
        note=f"{needed * passes} are needed, for prompts once per group, in {passes} model(s); "
        "counted where tokens enter a model, so padding inside attention is not in it",
    )


@contextmanager
def counting(language_models: list[Any]) -> Iterator[list[int]]:
    """A list that grows by the number of token ids whenever some enter one of the models."""
    seen: list[int] = []
    hooks = [
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].numel())
        )
        for model in language_models
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
