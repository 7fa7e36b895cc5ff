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

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import load
from posttrain.backends.sampler import LocalSampler
from posttrain.external import MODEL_FILES
from posttrain.modes import in_modes
from posttrain.report.statistics import mean_interval
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.judging import Responses
from posttrain.rewards.pool import VerifierPool
from posttrain.stages.batches import Problem
from posttrain.stages.context import Context
from posttrain.stages.judging import make_reward, responses_of
from posttrain.stages.rollouts import Scored, sample_and_verify, step_seed, verifiers
from posttrain.stages.settings.models import Best

EDGE = "candidates."


def run(config: Best, ctx: Context) -> dict[str, Any]:
    """Let all candidates answer the same problems; write best.json and the winner's files."""
    judges = verifiers(ctx)
    problems = {
        name: in_modes(ctx.problems(name, "validation")[: config.num_problems], config.modes)
        for name in ctx.domains
    }
    paths = {e.removeprefix(EDGE): p for e, p in ctx.inputs.items() if e.startswith(EDGE)}
    answers: dict[str, list[Scored]] = {}
    for number, (name, path) in enumerate(paths.items()):
        answers[name] = answer(config, ctx, path, problems, judges)
        tokens = sum(scored.rollouts.num_tokens for scored in answers[name])
        rewards = [float(scored.reward_B.mean()) for scored in answers[name]]
        ctx.log(number + 1, len(paths), tokens=tokens, reward=float(np.mean(rewards)))
    worths = {name: [s.reward_B.double() for s in rows] for name, rows in answers.items()}
    if config.judge is not None:
        worths = judge_scores(config.judge, config, ctx, answers)
    found = {
        name: measured(config, list(problems), rows, worths[name]) for name, rows in answers.items()
    }
    # The first of equal ones: max keeps it.
    winner = max(found, key=lambda name: found[name]["value"])
    result = {"winner": winner, "metric": config.metric, "split": "validation"}
    text = json.dumps(result | {"candidates": found}, indent=1)
    (ctx.out / "best.json").write_text(text, encoding="utf-8")
    take_over(paths[winner], ctx.out)
    summary: dict[str, Any] = {"winner": winner, "score": found[winner]["value"]}
    for name, scores in found.items():
        summary |= {f"score/{name}": scores["value"]}
        summary |= {f"{end}/{name}": scores[end] for end in ("low", "high")}
    return summary


def answer(
    config: Best,
    ctx: Context,
    path: Path,
    problems: dict[str, list[Problem]],
    judges: VerifierPool,
) -> list[Scored]:
    """A candidate's answers by domain; all candidates draw with the same random numbers."""
    language_model = load(path, dtype=getattr(torch, config.precision), device=ctx.device)
    chat, sampler = Chat(language_model), LocalSampler(language_model)
    greedy = config.metric == "greedy"
    return [
        sample_and_verify(
            sampler,
            chat,
            rows,
            judges,
            group_size=1 if greedy else config.samples,
            max_new_tokens=config.max_new_tokens,
            temperature=0.0 if greedy else 1.0,
            seed=step_seed(config.seed, number),
        )
        for number, rows in enumerate(problems.values())
    ]


def judge_scores(
    judge: Judge, config: Best, ctx: Context, answers: dict[str, list[Scored]]
) -> dict[str, list[Tensor]]:
    """The judge's scores (float64) of all answers, those of all candidates to a problem in one
    group: a judge that compares responses compares the candidates."""
    parts = [responses_of(scored) for rows in answers.values() for scored in rows]
    group: list[int] = []
    for rows in answers.values():
        first = 0
        for scored in rows:
            group += (scored.group_B + first).tolist()
            first += int(scored.group_B.max()) + 1
    responses = Responses(
        problems=[problem for part in parts for problem in part.problems],
        texts=[text for part in parts for text in part.texts],
        group=group,
        finished=[whole for part in parts for whole in part.finished],
        num_tokens=[count for part in parts for count in part.num_tokens],
        verdicts=[verdict for part in parts for verdict in part.verdicts or ()],
    )
    dtype = getattr(torch, config.precision)
    scores, _ = make_reward(judge, ctx, dtype=dtype, seed=config.seed).score(responses)
    score_B = torch.tensor(scores, dtype=torch.float64)
    split = iter(score_B.split([len(part) for part in parts]))
    return {name: [next(split) for _ in rows] for name, rows in answers.items()}


def measured(
    config: Best, domains: list[str], answers: list[Scored], worths: list[Tensor]
) -> dict[str, Any]:
    """What a candidate is worth, with its interval.

    The value is a mean over domains of the mean over problems of worth minus `length_weight` times
    length in `max_new_tokens`.
    """
    means = []
    for scored, worth_B in zip(answers, worths, strict=True):
        length_B = scored.rollouts.response_len_B.double()
        net_B = worth_B - config.length_weight * length_B / config.max_new_tokens
        count = int(scored.group_B.max()) + 1
        means.append(net_B.reshape(count, -1).mean(dim=1).numpy())
    interval = mean_interval(means, resamples=config.bootstrap, seed=config.seed)
    rewards = [float(scored.reward_B.double().mean()) for scored in answers]
    tokens = sum(scored.rollouts.num_tokens for scored in answers)
    length = tokens / sum(len(scored.texts) for scored in answers)
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
