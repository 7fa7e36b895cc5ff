"""The best of several models on validation problems: its checkpoint becomes the stage's own.

Legend: B rows (answers).
"""

from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.backends.checkpoint_source import MODEL_FILES
from posttrain.backends.prompting import Problem, in_modes
from posttrain.engine.graph import edge_name, named
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.pool import VerifierPool
from posttrain.rl.batch import Batch, concatenate
from posttrain.rl.seeds import step_seed
from posttrain.rl.statistics import mean_interval
from posttrain.stages.context import Context
from posttrain.stages.judging import make_reward, responses_of
from posttrain.stages.rollout import rollout, verifiers
from posttrain.stages.settings.models import Best


def run(settings: Best, ctx: Context) -> dict[str, Any]:
    """Let all candidates answer the same problems; write best.json and the winner's files."""
    verifier_pool = verifiers(ctx)
    problems = {
        name: in_modes(ctx.problems(name, "validation")[: settings.num_problems], settings.modes)
        for name in ctx.domains
    }
    names = list(named(ctx.inputs, "candidates"))
    answers: dict[str, list[Batch]] = {}
    for number, name in enumerate(names):
        answers[name] = answer(
            settings, ctx, edge_name("candidates", name), problems, verifier_pool
        )
        tokens = sum(batch.num_tokens for batch in answers[name])
        rewards = [float(batch["reward_B"].mean()) for batch in answers[name]]
        ctx.log(number + 1, len(names), tokens=tokens, reward=float(np.mean(rewards)))
    worths = {name: [b["reward_B"].double() for b in of_it] for name, of_it in answers.items()}
    if settings.judge is not None:
        worths = judge_scores(settings.judge, settings, ctx, answers)
    found = {
        name: measured(settings, list(problems), of_it, worths[name])
        for name, of_it in answers.items()
    }
    # The first of equal ones: max keeps it.
    winner = max(found, key=lambda name: found[name]["value"])
    result = {"winner": winner, "metric": settings.metric, "split": "validation"}
    text = json.dumps(result | {"candidates": found}, indent=1)
    (ctx.out / "best.json").write_text(text, encoding="utf-8")
    take_over(ctx.inputs[edge_name("candidates", winner)], ctx.out)
    summary: dict[str, Any] = {"winner": winner, "score": found[winner]["value"]}
    for name, scores in found.items():
        summary |= {f"score/{name}": scores["value"]}
        summary |= {f"{end}/{name}": scores[end] for end in ("low", "high")}
    return summary


def answer(
    settings: Best,
    ctx: Context,
    edge: str,
    problems: dict[str, list[Problem]],
    verifier_pool: VerifierPool,
) -> list[Batch]:
    """A candidate's answers by domain; all candidates draw with the same random numbers."""
    sampler = ctx.sampler(edge, precision=settings.precision)
    greedy = settings.metric == "greedy"
    return [
        rollout(
            sampler,
            rows,
            verifier_pool,
            group_size=1 if greedy else settings.samples,
            max_new_tokens=settings.max_new_tokens,
            temperature=0.0 if greedy else 1.0,
            seed=step_seed(settings.seed, number),
        )
        for number, rows in enumerate(problems.values())
    ]


def judge_scores(
    judge: Judge, settings: Best, ctx: Context, answers: dict[str, list[Batch]]
) -> dict[str, list[Tensor]]:
    """The judge's scores (float64) of all answers, those of all candidates to a problem in one
    group: a judge that compares responses compares the candidates."""
    of_candidates = [concatenate(batches) for batches in answers.values()]
    group_B = torch.cat([batch["group_B"] for batch in of_candidates])
    together = concatenate(of_candidates)
    together["group_B"] = group_B
    reward = make_reward(judge, ctx, precision=settings.precision, seed=settings.seed)
    scores, _ = reward.score(responses_of(together))
    score_B = torch.tensor(scores, dtype=torch.float64)
    split = iter(score_B.split([len(b) for batches in answers.values() for b in batches]))
    return {name: [next(split) for _ in batches] for name, batches in answers.items()}


def measured(
    settings: Best, domains: list[str], answers: list[Batch], worths: list[Tensor]
) -> dict[str, Any]:
    """What a candidate is worth, with its interval.

    The value is a mean over domains of the mean over problems of worth minus `length_weight` times
    length in `max_new_tokens`.
    """
    means = []
    for batch, worth_B in zip(answers, worths, strict=True):
        length_B = batch.sampled_len_B.double()
        net_B = worth_B - settings.length_weight * length_B / settings.max_new_tokens
        count = int(batch["group_B"].max()) + 1
        means.append(net_B.reshape(count, -1).mean(dim=1).numpy())
    interval = mean_interval(means, resamples=settings.bootstrap, seed=settings.seed)
    rewards = [float(batch["reward_B"].double().mean()) for batch in answers]
    length = sum(batch.num_tokens for batch in answers) / sum(map(len, answers))
    about = {"reward": float(np.mean(rewards)), "response_length": length}
    return interval | about | {"rewards": dict(zip(domains, rewards, strict=True))}


def take_over(source: Path, out: Path) -> None:
    """The files of a model in another place without copying, where the file system allows it."""
    for path in sorted(source.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in MODEL_FILES):
            continue
        target = out / path.name
        target.unlink(missing_ok=True)
        # What a link of an outside checkpoint points at may change; links keep pointing at it.
        if path.is_symlink():
            target.symlink_to(path.resolve())
            continue
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
