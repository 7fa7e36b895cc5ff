"""Supervised fine-tuning: mean cross-entropy of the demonstrations' response tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from posttrain.backends.base import Head, Metrics, MicroBatch, Part
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import load, save
from posttrain.backends.local import LocalLearner, response_targets
from posttrain.losses.ops import token_logprobs
from posttrain.losses.sft import cross_entropy
from posttrain.rewards.oracle import demonstrate
from posttrain.rl.types import Rollouts
from posttrain.schedules import learning_rate
from posttrain.stages.auxiliary import (
    Auxiliary,
    check_demonstrated,
    encode,
    rows_by_domain,
    take_metrics,
)
from posttrain.stages.batches import Batches, Problem
from posttrain.stages.context import Context
from posttrain.stages.learner import new_learner, steps_to_do
from posttrain.stages.rollouts import verifiers
from posttrain.stages.settings.imitate import Pretrain, Sft
from posttrain.suites.prompting import also_hinted


def run(config: Sft, ctx: Context) -> dict[str, float]:
    """Train from `start` on demonstrations, or on the rows of a `data` artifact."""
    language_model = load(ctx.inputs["start"], device=ctx.device)
    chat = Chat(language_model)
    demos = also_hinted(demonstrations(config, ctx), config.hint, where=f"stage {ctx.name!r}")
    batches = Batches(demos, config, size="batch_size", stage=ctx.name)
    num_rows = sum(map(len, demos.values()))
    steps = config.steps or math.ceil((config.epochs or 0) * num_rows / config.batch_size)
    learner = new_learner(config, language_model, ctx)
    aux = Auxiliary(config, config.seed, ctx, chat, language_model.pad_id)
    for step, now in steps_to_do(config, ctx, learner, batches, steps):
        batch = encode(batches.draw(now), chat, language_model.pad_id)
        lr = learning_rate(now, step, steps)
        metrics = imitate(learner, batch, lr=lr, also=aux.parts(step, now.aux))
        ctx.log(step + 1, steps, tokens=batch.num_tokens, **metrics, **now.scheduled())
        ctx.checkpoint(step + 1, learner)
    save(learner.result(), ctx.out)
    return {"loss": ctx.metrics["loss"], "tokens": ctx.tokens}


def imitate(
    learner: LocalLearner, batch: Rollouts, *, lr: float, also: Sequence[Part] = ()
) -> dict[str, float]:
    """One step of cross-entropy on the response tokens of `batch`, averaged over tokens."""

    def loss(hidden_ND: Tensor, head: Head, part: MicroBatch) -> tuple[Tensor, Metrics]:
        targets_N = response_targets(part.rollouts)
        logp_N, _ = token_logprobs(hidden_ND, head.weight_VD, targets_N, bias_V=head.bias_V)
        total, _ = cross_entropy(logp_N, logp_N.new_ones(len(targets_N)))
        return total, {"loss": total.detach()}

    count = batch.num_tokens
    sums = learner.update(batch, loss, count=count, lr=lr, also=also)
    metrics = {"loss": sums["loss"] / count, "grad_norm": sums["grad_norm"], "lr": lr}
    return metrics | take_metrics(sums)


def demonstrations(config: Pretrain | Sft, ctx: Context) -> dict[str, list[Problem]]:
    """Rows with prompt and demo by domain: of the domains themselves, or of a data artifact.

    Those of domains are in the stage's modes, and some of them wrong with `demo_noise`.
    """
    if "data" in ctx.inputs:
        return rows_by_domain(ctx.inputs["data"] / "data.jsonl", ctx.name)
    return demonstrated(
        ctx, ctx.domains, modes=config.modes, noise=config.demo_noise, seed=config.seed
    )


def demonstrated(
    ctx: Context, domains: Iterable[str], *, modes: Sequence[str], noise: float, seed: int
) -> dict[str, list[Problem]]:
    """The demonstrations of these domains in each of the modes, a share `noise` of them wrong.

    Raises ConfigError for a problem that has none.
    """
    demos = {name: ctx.problems(name, "train", modes) for name in domains}
    check_demonstrated(demos, ctx.name)
    return with_slips(ctx, demos, noise=noise, seed=seed) if noise else demos


def with_slips(
    ctx: Context, demos: dict[str, list[Problem]], *, noise: float, seed: int
) -> dict[str, list[Problem]]:
    """The demonstrations as a careless annotator gives them."""
    pool = verifiers(ctx)

    def score(text: str, problem: Mapping[str, Any]) -> float:
        return pool.scores([problem], [text])[0]

    def noisy(rows: list[Problem]) -> list[Problem]:
        by_mode: dict[str | None, list[Problem]] = {}
        for row in rows:
            by_mode.setdefault(row.get("mode"), []).append(row)
        return [
            row
            | {"demo": demonstrate(row, by_mode[row.get("mode")], score, noise=noise, seed=seed)}
            for row in rows
        ]

    return {name: noisy(rows) for name, rows in demos.items()}
