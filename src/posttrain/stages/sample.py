"""Draw K scored responses per prompt from one model or several, or from each domain's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import load
from posttrain.backends.sampler import LocalSampler
from posttrain.rewards.pool import VerifierPool
from posttrain.stages.batches import Problem
from posttrain.stages.context import Context
from posttrain.stages.rollout_log import rollout_rows
from posttrain.stages.rollouts import (
    Scored,
    sample_and_verify,
    step_seed,
    verifiers,
    write_jsonl,
)
from posttrain.stages.settings.data import Drawn, Profile, Sample
from posttrain.suites.prompting import in_modes

PROMPTS_PER_CALL = 64


def run(config: Sample, ctx: Context) -> dict[str, float]:
    """Write rollouts.jsonl: problem, response, reward, finished, num_tokens, model, temperature."""
    judges = verifiers(ctx)
    rows: list[dict[str, Any]] = []
    total = sum(len(config.routes[name]) for name in ctx.domains)
    for number, name in enumerate(ctx.domains):
        problems = chosen_problems(config, ctx, name)
        for place, model in enumerate(config.routes[name]):
            tokens = 0
            for scored in answers(
                config,
                ctx,
                ctx.inputs[f"models.{model}"],
                problems,
                judges,
                group_size=config.k,
                number=number + place * len(ctx.domains),
                prefix=config.prefix,
            ):
                tokens += scored.rollouts.num_tokens
                rows += rollout_rows(scored, model=model, temperature=config.temperature)
            mean = sum(row["reward"] for row in rows) / len(rows)
            done = sum(len(config.routes[n]) for n in list(ctx.domains)[:number]) + place + 1
            ctx.log(done, total, tokens=tokens, reward=mean)
    write_jsonl(ctx.out / "rollouts.jsonl", rows)
    return {"rows": len(rows), "reward": sum(row["reward"] for row in rows) / len(rows)}


def chosen_problems(config: Drawn, ctx: Context, domain: str) -> list[Problem]:
    """`num_prompts` training problems from `first_prompt` on, round the end, each in each mode.

    None is there twice in a mode.
    """
    problems = ctx.problems(domain, "train")
    count = min(config.num_prompts, len(problems))
    chosen = [problems[(config.first_prompt + i) % len(problems)] for i in range(count)]
    return in_modes(chosen, config.modes)


def answers(
    config: Sample | Profile,
    ctx: Context,
    model: Path,
    problems: list[Problem],
    judges: VerifierPool,
    *,
    group_size: int,
    number: int,
    prefix: str = "",
) -> Iterator[Scored]:
    """A model's responses to `problems`, some prompts at a time; `number` is that of the draw.

    Draws of one stage with other numbers, and of other `first_prompt`, share no random numbers.
    """
    language_model = load(model, dtype=getattr(torch, config.precision), device=ctx.device)
    chat, sampler = Chat(language_model), LocalSampler(language_model)
    for start in range(0, len(problems), PROMPTS_PER_CALL):
        yield sample_and_verify(
            sampler,
            chat,
            problems[start : start + PROMPTS_PER_CALL],
            judges,
            group_size=group_size,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=step_seed(config.seed, (number << 20) + config.first_prompt + start),
            prefix=prefix,
        )
