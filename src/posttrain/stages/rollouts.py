"""Problems in, scored responses out: what the stages that sample have in common.

Legend: B rows (responses), N flat response tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.backends.base import Sampler, Sampling
from posttrain.backends.chat import Chat
from posttrain.rewards.pool import VerifierPool
from posttrain.rl.types import Rollouts
from posttrain.stages.batches import Problem
from posttrain.stages.context import Context

CHUNK_ROWS = 16
"""Responses that go to a verifier at a time."""
MAX_WORKERS = 8
"""A process takes about 100 MB where it needs reasoning-gym."""


class Reader(Protocol):
    """Something that reads responses as they end, such as the teachers of a distillation."""

    def read(self, row_B: Tensor, sampling: Sampling) -> None:
        """Rows `row_B` of `sampling` have ended."""
        ...


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Rollouts with the problem that each row answers and, where verified, its reward."""

    rollouts: Rollouts
    problems: list[Problem]
    """One per row; the rows of a group repeat theirs."""
    group_B: Tensor
    """int64, which prompt of the batch a row answers."""
    texts: list[str]
    reward_B: Tensor
    """float32, what a policy learns from; the verifier's score where no other judge is asked."""
    verified_B: Tensor
    """float32 in [0, 1], the verifier's score; all zero where nothing was verified."""


def verifiers(ctx: Context) -> VerifierPool:
    """The verifiers of all domains that the stage has; they end with the stage.

    Call it first: what it starts gets ready while the models are loaded.
    """
    pool = VerifierPool(ctx.domains, num_workers=min(ctx.threads, MAX_WORKERS))
    return ctx.resources.enter_context(pool)


def sample_and_verify(
    sampler: Sampler,
    chat: Chat,
    problems: Sequence[Problem],
    judges: VerifierPool | None,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    top_p: float = 1.0,
    reader: Reader | None = None,
    prefix: str = "",
) -> Scored:
    """Sample a group per problem and score every response with its domain's verifier.

    Responses are verified, and read by a `reader`, as they end, beside those still being sampled. A
    response that was cut at the length limit scores 0: it has not given its answer. So does one
    that thinks and does not end to think. Without `judges`, rewards are 0 and texts are left out.
    Every response begins with the text `prefix`, whose tokens count as the prompt's. A problem with
    `asked` is asked that instead of its prompt.
    """
    begun = chat.begin(prefix)
    sampling = sampler.stream(
        [[*chat.prompt(p.get("asked", p["prompt"]), p.get("mode")), *begun] for p in problems],
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        top_p=top_p,
    )
    rows = [problem for problem in problems for _ in range(group_size)]
    texts = [""] * len(rows) if judges is not None else []
    verdicts: list[tuple[list[int], Future[list[float]]]] = []
    for row_B in gathered(sampling, CHUNK_ROWS):
        if reader is not None:
            reader.read(row_B, sampling)
        if judges is not None:
            index = row_B.tolist()
            for row, ids in zip(index, sampling.responses(row_B), strict=True):
                texts[row] = prefix + chat.decode(ids)
            complete = sampling.finished(row_B).tolist()
            ended = [row for row, whole in zip(index, complete, strict=True) if whole]
            verdicts += submit(judges, ended, texts, rows)
    reward_B = torch.zeros(len(rows))
    for part, scores in verdicts:
        reward_B[part] = torch.tensor(scores.result(), dtype=torch.float32)
    return Scored(
        rollouts=sampling.rollouts(),
        problems=rows,
        group_B=torch.arange(len(problems)).repeat_interleave(group_size),
        texts=texts,
        reward_B=reward_B,
        verified_B=reward_B,
    )


def gathered(rows: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """The row numbers that come, at least `count` at a time, in ascending order; then the rest."""
    waiting: list[Tensor] = []
    for row_B in rows:
        waiting.append(row_B)
        if sum(map(len, waiting)) >= count:
            yield torch.cat(waiting).sort().values
            waiting = []
    if waiting:
        yield torch.cat(waiting).sort().values


def submit(
    judges: VerifierPool, index: Iterable[int], texts: Sequence[str], problems: Sequence[Problem]
) -> list[tuple[list[int], Future[list[float]]]]:
    """Begin to verify the rows in `index` of `texts`, responses to `problems`.

    Returns parts of `index`, each of one domain and of few rows, with their scores to come.
    """
    by_domain: dict[str, list[int]] = {}
    for row in index:
        by_domain.setdefault(problems[row]["domain"], []).append(row)
    parts = [
        (domain, rows[start : start + CHUNK_ROWS])
        for domain, rows in by_domain.items()
        for start in range(0, len(rows), CHUNK_ROWS)
    ]
    return [
        (part, judges.submit(domain, [texts[i] for i in part], [problems[i] for i in part]))
        for domain, part in parts
    ]


def equal_parts(num_rows: int, num_parts: int, *, seed: int, step: int) -> Iterator[Tensor]:
    """Row indices for the optimiser steps of one batch: a permutation cut into equal shares."""
    if num_parts == 1:
        yield torch.arange(num_rows)
        return
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    order_B = torch.randperm(num_rows, generator=generator)
    for part_B in order_B.tensor_split(num_parts):
        if len(part_B):
            yield part_B.sort().values


def step_seed(seed: int, step: int) -> int:
    """A seed for one step of one stage, distinct for every pair below 2**31."""
    return (seed << 31) + step


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
