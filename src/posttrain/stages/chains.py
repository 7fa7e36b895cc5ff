"""Chains of responses: each segment's prompt has the response before it, the last one is judged.

A model that works beyond one context writes down what it goes on from; the whole chain then shares
one reward (self-summaries: Composer 2). Every segment is a row of the batch, and those of a chain
stand together: prompt after prompt, chain after chain, segment after segment.

Legend: B rows (responses), C chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from posttrain.backends.base import Sampler
from posttrain.backends.chat import Chat
from posttrain.modes import visible
from posttrain.rewards.judging import Responses
from posttrain.rewards.pool import VerifierPool
from posttrain.stages.batches import Problem
from posttrain.stages.curriculum import derived_seed
from posttrain.stages.judging import responses_of
from posttrain.stages.rollouts import Scored, sample_and_verify
from posttrain.stages.scored import joined, rows_of


def sample_chains(
    sampler: Sampler,
    chat: Chat,
    problems: Sequence[Problem],
    judges: VerifierPool,
    *,
    segments: int,
    chain: str,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Scored:
    """`group_size` chains of `segments` rows for each problem, with the last one's verdict.

    `chain` makes the next prompt of {prompt}, the problem's own, and {response}, what a verifier
    would see of the response before. The problem of a row has as `asked` the prompt that the row
    answers. A segment that was cut at the length limit is gone on from as it stands.
    """
    sample = partial(
        sample_and_verify,
        sampler,
        chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    if segments == 1:
        return sample(problems, judges, group_size=group_size, seed=seed)
    parts: list[Scored] = []
    for number in range(segments):
        rows = parts[-1].problems if parts else list(problems)
        asked = [row["prompt"] for row in rows]
        if parts:
            asked = _next_prompts(chain, parts[-1])
        part = sample(
            [row | {"asked": prompt} for row, prompt in zip(rows, asked, strict=True)],
            judges if number == segments - 1 else None,
            group_size=1 if parts else group_size,
            seed=derived_seed(seed, number) if parts else seed,
        )
        if not part.texts:
            part = replace(part, texts=[chat.decode(ids) for ids in part.rollouts.responses()])
        parts.append(part)
    return _by_chain(parts)


def _next_prompts(chain: str, before: Scored) -> list[str]:
    return [
        chain.format(prompt=row["prompt"], response=visible(text, row.get("mode")) or "")
        for row, text in zip(before.problems, before.texts, strict=True)
    ]


def _by_chain(parts: Sequence[Scored]) -> Scored:
    """One segment of all chains after the other, put together chain by chain."""
    num_chains, segments = len(parts[0].problems), len(parts)
    order_B = torch.arange(segments * num_chains).view(segments, num_chains).T.flatten()
    verdict_B = parts[-1].verified_B.repeat_interleave(segments)
    return replace(
        rows_of(joined(parts), order_B),
        group_B=parts[0].group_B.repeat_interleave(segments),
        reward_B=verdict_B,
        verified_B=verdict_B,
    )


def last_of(value_B: Tensor, segments: int) -> Tensor:
    """`value_C`: of each chain what its last row has."""
    return value_B[segments - 1 :: segments]


def sum_of(value_B: Tensor, segments: int) -> Tensor:
    """`value_C`: the sum over the rows of each chain."""
    return value_B.view(-1, segments).sum(1)


def chain_responses(scored: Scored, segments: int) -> Responses:
    """The chains as judges see them: the last segment's response, the whole chain's tokens."""
    if segments == 1:
        return responses_of(scored)
    rows_C = last_of(torch.arange(len(scored.problems)), segments)
    lengths_C = sum_of(scored.rollouts.response_len_B, segments)
    return replace(responses_of(rows_of(scored, rows_C)), num_tokens=lengths_C.tolist())
