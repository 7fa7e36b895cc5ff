"""Problems in, sampled and verified responses out, as one batch: what all stages that sample share.

Legend: B rows (responses), N sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.algorithms import TokenMean
from posttrain.backends.base import Sampler, Sampling
from posttrain.backends.prompting import Problem, asked
from posttrain.rewards.pool import VerifierPool
from posttrain.rl.batch import Batch, Minibatch, split
from posttrain.stages.context import Context
from posttrain.stages.sampled_ids import names
from posttrain.stages.settings.distill import Distill
from posttrain.stages.settings.rl import Rl

CHUNK_ROWS = 16
"""Responses that go to a verifier at a time."""
NAN = float("nan")
MAX_WORKERS = 8
"""A process takes about 100 MB where it needs reasoning-gym."""


class Reader(Protocol):
    """Something that reads responses as they end, such as the teachers of a distillation."""

    def on_finished(self, row_B: Tensor, sampling: Sampling) -> None:
        """Rows `row_B` of `sampling` have ended."""
        ...


def verifiers(ctx: Context) -> VerifierPool:
    """The verifiers of all domains that the stage has; they end with the stage.

    Call it first: what it starts gets ready while the models are loaded.
    """
    pool = VerifierPool(ctx.domains, num_workers=min(ctx.threads, MAX_WORKERS))
    return ctx.resources.enter_context(pool)


def rollout(
    sampler: Sampler,
    problems: Sequence[Problem],
    verifiers: VerifierPool | None,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    top_p: float = 1.0,
    reader: Reader | None = None,
    prefix: str = "",
) -> Batch:
    """Sample a group per problem and score every response with its domain's verifier.

    Columns: `group_B` (int64, which of `problems` a row answers), `verified_B` and `reward_B`
    (float64, so that .9 is the .9 that the verifier said; its score in [0, 1], NaN in a domain
    without one; another judge may replace the reward), `tokenizer_B` and `begun_B` (int64: whose
    ids the tokens are, and how many of a row's prompt begin its response; see `sampled_ids_of`),
    and the sampler's own.

    Responses are verified, and read by a `reader`, as they end, beside those still being sampled. A
    response that was cut at the length limit scores 0: it has not given its answer. So does one
    that thinks and does not end to think. Without `verifiers`, scores are 0 and texts are left out.
    Every response begins with the text `prefix`, whose tokens count as the prompt's.
    """
    chat = sampler.chat
    begun = chat.begin(prefix)
    sampling = sampler.stream(
        [[*chat.prompt(asked(problem), problem.get("mode")), *begun] for problem in problems],
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        top_p=top_p,
    )
    opened = [chat.opened(asked(problem), problem.get("mode")) for problem in problems]
    # From one problem per group to one per row; rows of a group are neighbours.
    rows = [problem for problem in problems for _ in range(group_size)]
    texts = [""] * len(rows) if verifiers is not None else []
    pending: list[tuple[list[int], Future[list[float]]]] = []
    for row_B in gathered(sampling, CHUNK_ROWS):
        if reader is not None:
            reader.on_finished(row_B, sampling)
        if verifiers is not None:
            index = row_B.tolist()
            for row, ids in zip(index, sampling.responses(row_B), strict=True):
                # What went in with the prompt is part of what the verifier reads. A prefix is
                # decoded along: some tokenizers leave out a space at the beginning of a text.
                texts[row] = opened[row // group_size] + chat.decode([*begun, *ids])
            complete = sampling.finished(row_B).tolist()
            # The others keep the 0 of `verified_B`, and those that nobody verifies the NaN.
            ended = [row for row, whole in zip(index, complete, strict=True) if whole]
            pending += submit(verifiers, ended, texts, rows)
    unverified = frozenset() if verifiers is None else verifiers.unverified
    verified_B = torch.tensor(
        [NAN if row["domain"] in unverified else 0.0 for row in rows], dtype=torch.float64
    )
    for part, scores in pending:
        verified_B[part] = torch.tensor(scores.result(), dtype=torch.float64)
    batch = sampling.batch()
    batch.problems.extend(rows)
    batch.texts.extend(texts)
    batch["group_B"] = torch.arange(len(problems)).repeat_interleave(group_size)
    batch["tokenizer_B"] = torch.full((len(rows),), _as_number(chat.tokens_digest))
    batch["begun_B"] = torch.full((len(rows),), len(begun))
    # One tensor under both names: a judge puts another in place of the reward, it never writes.
    batch["verified_B"] = batch["reward_B"] = verified_B
    return batch


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
    verifiers: VerifierPool,
    index: Iterable[int],
    texts: Sequence[str],
    problems: Sequence[Problem],
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
        (part, verifiers.submit(domain, [texts[i] for i in part], [problems[i] for i in part]))
        for domain, part in parts
    ]


def minibatches(s: Rl | Distill, batch: Batch, step: int) -> list[Minibatch]:
    """The minibatches of a step, of the rows to learn from (`train_B`); see `rl.batch.split`."""
    return split(
        batch,
        s.num_minibatches,
        seed=s.seed,
        step=step,
        by_token=isinstance(s.aggregation, TokenMean),
        per_kept=s.per_kept,
    )


def sampled_ids_of(batch: Batch) -> list[dict[str, Any]]:
    """For each row of a `rollout` the ids of its response and whose they are, as rows of files have
    them (`sampled_ids.py`)."""
    ids_field, of_field = names("response")
    begins_B = batch.prompt_len_B - batch["begun_B"]
    places = zip(begins_B.tolist(), batch.length_B.tolist(), strict=True)
    ids = [
        row[begin:end] for row, (begin, end) in zip(batch.tokens_BT.tolist(), places, strict=True)
    ]
    whose = [_as_digest(number) for number in batch["tokenizer_B"].tolist()]
    return [{ids_field: i, of_field: w} for i, w in zip(ids, whose, strict=True)]


def _as_number(digest: str) -> int:
    """A digest of 16 hex digits as an int64, which a column can have."""
    return int.from_bytes(bytes.fromhex(digest), signed=True)


def _as_digest(number: int) -> str:
    return number.to_bytes(8, signed=True).hex()


def rollout_rows(batch: Batch, *, model: str, temperature: float) -> list[dict[str, object]]:
    """One row of rollouts.jsonl per response: its problem, what was said, how it was verified."""
    rows = zip(
        batch.problems,
        batch.texts,
        batch["verified_B"].tolist(),
        batch["finished_B"].tolist(),
        batch.sampled_len_B.tolist(),
        sampled_ids_of(batch),
        strict=True,
    )
    kept = ("id", "domain", "prompt", "answer", "mode", "messages")
    return [
        {key: problem[key] for key in kept if key in problem}
        | {
            "response": text,
            # Whoever verified nothing gave no reward.
            "reward": None if math.isnan(reward) else reward,
            "finished": finished,
            "model": model,
            "temperature": temperature,
            "num_tokens": length,
        }
        | ids
        for problem, text, reward, finished, length, ids in rows
    ]


def verified_mean(value_B: Tensor) -> float | None:
    """The mean over the rows that have a value; None where none has one (NaN)."""
    known_B = value_B[~value_B.isnan()]
    return float(known_B.mean()) if len(known_B) else None
