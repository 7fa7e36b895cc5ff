"""The best of several models on validation problems: its checkpoint becomes the stage's own."""

from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import load
from posttrain.backends.sampler import LocalSampler
from posttrain.external import MODEL_FILES
from posttrain.modes import in_modes
from posttrain.report.statistics import mean_interval
from posttrain.rewards.pool import VerifierPool
from posttrain.stages.batches import Problem
from posttrain.stages.context import Context
from posttrain.stages.rollouts import sample_and_verify, step_seed, verifiers
from posttrain.stages.settings.models import Best

EDGE = "candidates."


def run(config: Best, ctx: Context) -> dict[str, Any]:
    """Let all candidates answer the same problems; write best.json and the winner's files."""
    judges = verifiers(ctx)
    problems = {
        name: in_modes(ctx.problems(name, "validation")[: config.num_problems], config.modes)
        for name in ctx.domains
    }
    found: dict[str, dict[str, Any]] = {}
    paths = {e.removeprefix(EDGE): p for e, p in ctx.inputs.items() if e.startswith(EDGE)}
    for number, (name, path) in enumerate(paths.items()):
        found[name], tokens = measure(config, ctx, path, problems, judges)
        ctx.log(number + 1, len(paths), tokens=tokens, score=found[name]["value"])
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


def measure(
    config: Best,
    ctx: Context,
    path: Path,
    problems: dict[str, list[Problem]],
    judges: VerifierPool,
) -> tuple[dict[str, Any], int]:
    """What a candidate is worth, with its interval, and the tokens that it sampled.

    The value is a mean over domains of the mean over problems of reward minus `length_weight` times
    length. All candidates draw with the same random numbers on the same problem.
    """
    language_model = load(path, dtype=getattr(torch, config.precision), device=ctx.device)
    chat, sampler = Chat(language_model), LocalSampler(language_model)
    greedy = config.metric == "greedy"
    size = 1 if greedy else config.samples
    worths, tokens, rewards, num_rows = [], 0, [], 0
    for number, rows in enumerate(problems.values()):
        scored = sample_and_verify(
            sampler,
            chat,
            rows,
            judges,
            group_size=size,
            max_new_tokens=config.max_new_tokens,
            temperature=0.0 if greedy else 1.0,
            seed=step_seed(config.seed, number),
        )
        length_B = scored.rollouts.response_len_B.double()
        cost_B = config.length_weight * length_B / config.max_new_tokens
        worth_B = scored.reward_B.double() - cost_B
        worths.append(worth_B.reshape(len(rows), size).mean(dim=1).numpy())
        rewards.append(float(scored.reward_B.double().mean()))
        tokens, num_rows = tokens + scored.rollouts.num_tokens, num_rows + len(length_B)
    interval = mean_interval(worths, resamples=config.bootstrap, seed=config.seed)
    about = {"reward": float(np.mean(rewards)), "response_length": tokens / num_rows}
    return interval | about | {"rewards": dict(zip(problems, rewards, strict=True))}, tokens


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
