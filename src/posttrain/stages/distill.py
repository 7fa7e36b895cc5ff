"""Multi-teacher on-policy distillation (MOPD): the student samples, its domain's teacher corrects.

Per step: draw prompts of all domains, let the student answer, let each teacher read the answers of
its own domains, and lower a divergence, usually the reverse KL, from student to teacher on the
student's own tokens (MOPD, arXiv 2606.30406; MiMo-V2-Flash, arXiv 2601.02780, section 4; estimators
and what each of them optimises: `losses/distill.py`). Routing is strict: a domain has one named
teacher.

Legend: B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import load, save
from posttrain.backends.local import LocalLearner
from posttrain.backends.sampler import LocalSampler
from posttrain.rl.advantage import advantages
from posttrain.schedules import learning_rate
from posttrain.stages.auxiliary import Auxiliary, take_metrics
from posttrain.stages.batches import Batches, Problem
from posttrain.stages.context import Context
from posttrain.stages.distill_update import DistillUpdate
from posttrain.stages.learner import new_learner, steps_to_do
from posttrain.stages.rollouts import (
    Scored,
    equal_parts,
    sample_and_verify,
    step_seed,
    verifiers,
)
from posttrain.stages.settings.distill import Distill
from posttrain.stages.teachers import Reading, Teachers, hinted_prompts


def run(config: Distill, ctx: Context) -> dict[str, float]:
    """Train `start` towards the teachers on the prompts of their domains."""
    judges = verifiers(ctx) if config.rewarded else None
    language_model = load(ctx.inputs["start"], device=ctx.device)
    domains, dtype = list(ctx.domains), getattr(torch, config.precision)
    paths = {name: ctx.inputs[f"teachers.{name}"] for name in config.teachers}
    teachers = Teachers(paths, language_model, dtype=dtype, device=ctx.device, workers=ctx.workers)
    chat = Chat(language_model)
    rows = {name: ctx.problems(name, "train", config.modes) for name in domains}
    batches = Batches(rows, config, size="prompts_per_step", stage=ctx.name)
    learner = new_learner(config, language_model, ctx)
    sampler = LocalSampler(learner.policy)
    aux = Auxiliary(config, config.seed, ctx, chat, language_model.pad_id)
    for step, now in steps_to_do(config, ctx, learner, batches, config.steps):
        problems = batches.draw(now)
        prompts = hinted_prompts(now, chat, problems, where=f"stage {ctx.name!r}")
        reading = teachers.reading(now, teacher_numbers(now, teachers, problems), prompts)
        scored = sample_and_verify(
            sampler,
            chat,
            problems,
            judges,
            group_size=now.samples_per_prompt,
            max_new_tokens=now.max_new_tokens,
            temperature=now.temperature,
            seed=step_seed(now.seed, step),
            reader=reading,
        )
        lr = learning_rate(now, step, config.steps)
        metrics = now.scheduled()
        metrics |= learn(now, learner, reading, domains, scored, lr=lr, step=step, aux=aux)
        ctx.log(step + 1, config.steps, tokens=scored.rollouts.num_tokens, **metrics)
        ctx.checkpoint(step + 1, learner)
    save(learner.result(), ctx.out)
    return {"kl": ctx.metrics["kl"], "tokens": ctx.tokens}


def teacher_numbers(config: Distill, teachers: Teachers, problems: list[Problem]) -> Tensor:
    """`teacher_B` of the responses to these problems, group after group."""
    numbers = []
    for place, problem in enumerate(problems):
        names = config.teachers_of(problem["domain"], problem.get("mode"))
        numbers.append(teachers.names.index(names[place % len(names)]))
    return torch.tensor(numbers).repeat_interleave(config.samples_per_prompt)


def learn(
    config: Distill,
    learner: LocalLearner,
    reading: Reading,
    domains: list[str],
    scored: Scored,
    *,
    lr: float,
    step: int,
    aux: Auxiliary | None = None,
) -> dict[str, float]:
    """All updates on one batch of the student's rollouts; returns the step's metrics."""
    rollouts = scored.rollouts
    domain_B = torch.tensor([domains.index(p["domain"]) for p in scored.problems])
    teacher_B = reading.teacher_B
    targets = reading.targets(rollouts)
    weight_B = domain_weights(config, domains, rollouts.response_len_B, domain_B)
    reward_B = advantages(scored.reward_B, scored.group_B, mode="group_mean")
    sums: dict[str, float] = {}
    count, num_updates = 0.0, 0
    for rows_B in equal_parts(len(rollouts), config.updates_per_batch, seed=config.seed, step=step):
        update = DistillUpdate(
            config,
            domains=domains,
            targets=targets,
            scored=scored,
            rows_B=rows_B,
            domain_B=domain_B[rows_B],
            teacher_B=teacher_B[rows_B],
            weight_B=weight_B[rows_B],
            advantage_B=reward_B[rows_B],
            device=learner.device,
        )
        also = (
            ()
            if aux is None
            else aux.parts(step * config.updates_per_batch + num_updates, config.aux)
        )
        part = learner.update(update.rows, update.loss, count=update.count, lr=lr, also=also)
        sums = {name: sums.get(name, 0.0) + part.get(name, 0.0) for name in sums | part}
        count, num_updates = count + update.count, num_updates + 1
    metrics = {"lr": lr, "grad_norm": sums.pop("grad_norm") / num_updates}
    metrics |= take_metrics(sums, num_updates)
    metrics["loss"] = sums.pop("loss") / count
    metrics |= describe(sums, domains, rollouts.num_tokens)
    metrics["response_length"] = float(rollouts.response_len_B.float().mean())
    metrics["finished_share"] = float(rollouts.finished_B.float().mean())
    if config.rewarded:
        metrics["reward"] = float(scored.reward_B.mean())
    for number, name in enumerate(reading.teachers.names):
        metrics[f"rows/{name}"] = float((teacher_B == number).sum())
    return metrics


def domain_weights(
    config: Distill, domains: list[str], response_len_B: Tensor, domain_B: Tensor
) -> Tensor:
    """`weight_B`: the configured weight of a row's domain, times its token balance if asked for.

    The balance is the domain's share of rows over its share of tokens in this batch (Open-MOPD,
    arXiv 2608.19098, token-share weights).
    """
    weight_of = torch.tensor([config.domain_weights.get(name, 1.0) for name in domains])
    if config.balance == "tokens":
        rows = torch.bincount(domain_B, minlength=len(domains)).float()
        tokens = torch.zeros(len(domains)).index_add(0, domain_B, response_len_B.float())
        weight_of *= (rows / rows.sum()) / (tokens / tokens.sum()).clamp(min=1e-9)
    return weight_of[domain_B]


def describe(sums: dict[str, float], domains: list[str], num_tokens: int) -> dict[str, float]:
    """Means per token, per domain and over all; `token_share/<domain>` adds up to 1."""
    metrics: dict[str, float] = {}
    for quantity in ("kl", "entropy"):
        values = {name: sums.pop(f"{quantity}/{name}", 0.0) for name in domains}
        metrics[quantity] = sum(values.values()) / num_tokens
        for name in domains:
            tokens = sums.get(f"tokens/{name}", 0.0)
            if tokens:
                metrics[f"{quantity}/{name}"] = values[name] / tokens
    for name in domains:
        metrics[f"token_share/{name}"] = sums.pop(f"tokens/{name}", 0.0) / num_tokens
    return metrics | {name: value / num_tokens for name, value in sums.items()}
