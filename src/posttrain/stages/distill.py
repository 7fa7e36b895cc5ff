"""Multi-teacher on-policy distillation (MOPD): the student samples, its domain's teacher corrects.

Per step: draw prompts of all domains, let the student answer, let each teacher read the answers of
its own domains, and lower a divergence, usually the reverse KL, from student to teacher on the
student's own tokens (MOPD, arXiv 2606.30406; MiMo-V2-Flash, arXiv 2601.02780, section 4; estimators
and what each of them optimises: `losses/distill.py`). Routing is strict: a domain has one named
teacher.

Columns that the loop gives the batch of a step, beside those of `rollout` and of the teachers
(`stages/teachers.py`):

    domain_B               int64, which domain the row is of
    loss_weight_B          float32, how much the row counts: its domain's weight and balance
    advantage_B            float32, of the verifiable reward, less the mean of the row's group

Legend: B rows, N sampled tokens, D the student's hidden size, E the teachers', K top-k, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.algorithms import (
    Jsd,
    SampledToken,
    SequenceMean,
    TokenShare,
    TopK,
    correction_arguments,
)
from posttrain.backends.base import Head, HeadLoss, HeadSource, Metrics
from posttrain.backends.chat import Chat
from posttrain.losses.distill import JSD_BETA, full_vocabulary, sampled_token, top_k
from posttrain.losses.divergence import TeacherStates
from posttrain.losses.ops import aggregation_weights, token_logprobs
from posttrain.losses.policy import policy_gradient
from posttrain.report.samples import Sample
from posttrain.rl.advantage import advantages
from posttrain.rl.batch import Batch, ragged_index
from posttrain.rl.corrections import importance_correction
from posttrain.rl.seeds import step_seed
from posttrain.schedules import learning_rate
from posttrain.stages.aux_losses import AuxData, pop_metrics
from posttrain.stages.context import Context
from posttrain.stages.data import Batches
from posttrain.stages.lengths import Reader, fit_prompts
from posttrain.stages.probes import due
from posttrain.stages.rollout import minibatches, rollout, verified_mean, verifiers
from posttrain.stages.samples import of_rollout, shown_rows, token_means
from posttrain.stages.settings.distill import Distill
from posttrain.stages.signs import cut_responses
from posttrain.stages.teachers import Teachers


def run(settings: Distill, ctx: Context) -> dict[str, float]:
    """Train `start` towards the teachers on the prompts of their domains."""
    verifier_pool = verifiers(ctx) if settings.rewarded else None
    policy = ctx.learner(settings)
    teachers = Teachers(settings, ctx, policy)
    sampler = ctx.sampler(policy)
    domains = tuple(ctx.domains)
    problems_of = {name: ctx.problems(name, "train", settings.modes) for name in domains}
    problems_of = fit_prompts(
        problems_of,
        settings,
        ctx,
        [Reader(name="the student", chat=policy.chat), *teachers.readers(settings)],
        new_tokens=round(max(settings.possible("max_new_tokens"))),
    )
    batches = Batches(problems_of, settings, size="prompts_per_step", stage=ctx.name)
    aux = AuxData(settings, ctx, policy.chat)
    for step, s in ctx.steps(settings, settings.steps, replayed=[batches, teachers], policy=policy):
        # Draw, and let the student answer; the teachers read each answer as it ends.
        problems = batches.draw(s)
        scoring = teachers.scoring(s, problems, probe=due(step, settings.steps))
        sampler.sync(policy)
        batch = rollout(
            sampler,
            problems,
            verifier_pool,
            group_size=s.samples_per_prompt,
            max_new_tokens=s.max_new_tokens,
            temperature=s.temperature,
            seed=step_seed(s.seed, step),
            reader=scoring,
        )
        scoring.add_columns(batch)
        # Which rows are learned from, what each counts, and what its reward is worth.
        every_B = torch.ones_like(batch["finished_B"])
        batch["train_B"] = batch["finished_B"] if s.mask_unfinished else every_B
        batch["domain_B"] = torch.tensor([domains.index(p["domain"]) for p in batch.problems])
        batch["loss_weight_B"] = loss_weights(s, domains, batch)
        # Where nobody verifies the reward is the same for all, and its advantage 0.
        reward_B = batch["reward_B"].float().nan_to_num(nan=0.0)
        batch["advantage_B"] = advantages(reward_B, batch["group_B"], mode="group_mean")
        # Update: one optimiser step on each share of the rows.
        no_states = isinstance(s.estimator, SampledToken | TopK)
        heads = () if no_states else teachers.heads
        loss = HeadLoss(distill_loss, LossSettings(step=s, domains=domains, heads=heads))
        lr = learning_rate(s, step, settings.steps)
        sums: dict[str, float] = {}
        count, num_updates = 0.0, 0
        for part in minibatches(s, batch, step):
            auxiliary = aux.losses(step * s.num_minibatches + part.number, s)
            found = policy.update(part.rows, loss, count=part.count, lr=lr, aux=auxiliary)
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            count, num_updates = count + part.count, num_updates + 1
        # Log.
        metrics = {"lr": lr}
        if num_updates:
            metrics["grad_norm"] = sums.pop("grad_norm") / num_updates
            metrics |= pop_metrics(sums, num_updates)
            metrics["loss"] = sums.pop("loss") / count
            # The others have been taken out: what is left are sums over tokens.
            metrics |= per_domain_metrics(sums, domains)
        if s.mask_unfinished:
            metrics["train_fraction"] = float(batch["train_B"].float().mean())
        metrics["response_length"] = float(batch.sampled_len_B.float().mean())
        metrics["finished_share"] = float(batch["finished_B"].float().mean())
        reward = verified_mean(batch["reward_B"]) if settings.rewarded else None
        if reward is not None:
            metrics["reward"] = reward
        for number, name in enumerate(teachers.names):
            metrics[f"rows/{name}"] = float((batch["teacher_B"] == number).sum())
        ctx.log(step + 1, settings.steps, tokens=batch.num_tokens, **s.scheduled(), **metrics)
        if ctx.samples.due(step + 1, settings.steps):
            ctx.samples.write(step + 1, samples(s, batch, policy.chat, heads))
        cut_responses(ctx, ctx.history("finished_share"), s.steps, s.max_new_tokens, policy.chat)
    policy.finish()
    policy.save(ctx.out)
    # Of the last step that learned; none did where all responses of all steps were left out.
    learned = ctx.history("kl")
    return ({"kl": learned[-1]} if learned else {}) | {"tokens": ctx.tokens}


def samples(s: Distill, batch: Batch, chat: Chat, heads: Sequence[HeadSource]) -> list[Sample]:
    """A few rows of the step: the reward where there is one, and one sample of the reverse KL to
    the teacher in nats per token, unless the estimator knows the teacher's top k only."""
    few = shown_rows(batch)
    values = {"reward": few["reward_B"]} if s.rewarded else {}
    if heads:
        _, few = in_order_of_teachers(few["teacher_hidden_NE"], few)
    if not isinstance(s.estimator, TopK):
        teacher_logp_N = teacher_logprobs(s, few, heads) if heads else few["teacher_logp_N"]
        values["kl"] = token_means(few["sampler_logp_N"] - teacher_logp_N, few)
    return of_rollout(few, chat, **values)


def teacher_logprobs(s: Distill, batch: Batch, heads: Sequence[HeadSource]) -> Tensor:
    """`logp_N` of the sampled tokens under the teachers of their rows, out of the teachers' hidden
    states; rows are in order of teachers. On the CPU."""
    states = teacher_states(heads, batch)
    targets = batch.targets_N.split([len(one.hidden_NE) for one in states])
    # Nothing keeps a head that was opened: there is never more than one.
    found = [_logprobs(s, one, targets_N) for one, targets_N in zip(states, targets, strict=True)]
    return torch.cat(found)


def _logprobs(s: Distill, states: TeacherStates, targets_N: Tensor) -> Tensor:
    one = states.opened()
    logp_N, _ = token_logprobs(
        # In the type in which the loss computes its logits.
        one.hidden_NE.to(one.dtype),
        one.head_VE,
        targets_N.to(one.hidden_NE.device),
        bias_V=one.bias_V,
        temperature=s.temperature,
    )
    return logp_N.cpu()


def loss_weights(step_settings: Distill, domains: Sequence[str], batch: Batch) -> Tensor:
    """`loss_weight_B`: the weight of a row's domain, times its token balance if asked for.

    The balance is the domain's share of rows over its share of tokens in this batch (Open-MOPD,
    arXiv 2608.19098, token-share weights). Where rows are averaged before they are added up each
    domain has its share already.
    """
    weights, domain_B = step_settings.domain_weights, batch["domain_B"]
    weight_of = torch.tensor([weights.get(name, 1.0) for name in domains])
    by_length = not isinstance(step_settings.aggregation, SequenceMean)
    if isinstance(step_settings.balance, TokenShare) and by_length:
        rows = torch.bincount(domain_B, minlength=len(domains)).float()
        tokens = torch.zeros(len(domains)).index_add(0, domain_B, batch.sampled_len_B.float())
        # A domain without a row in this batch would be 0 / 0.
        weight_of *= (rows / rows.sum()) / (tokens / tokens.sum()).clamp(min=1e-9)
    # One per domain -> one per row.
    return weight_of[domain_B]


def per_domain_metrics(sums: Mapping[str, float], domains: Sequence[str]) -> dict[str, float]:
    """Means per token, per domain and over all; `token_share/<domain>` adds up to 1."""
    rest = dict(sums)
    metrics: dict[str, float] = {}
    tokens = {name: rest.pop(f"tokens/{name}", 0.0) for name in domains}
    num_tokens = sum(tokens.values())
    for quantity in ("kl", "entropy"):
        values = {name: rest.pop(f"{quantity}/{name}", 0.0) for name in domains}
        metrics[quantity] = sum(values.values()) / num_tokens
        for name in domains:
            if tokens[name]:
                metrics[f"{quantity}/{name}"] = values[name] / tokens[name]
    for name in domains:
        metrics[f"token_share/{name}"] = tokens[name] / num_tokens
    return metrics | {name: value / num_tokens for name, value in rest.items()}


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the loss needs beside the batch."""

    step: Distill
    """The settings of the step."""
    domains: tuple[str, ...]
    """Names of the domains, which `domain_B` counts."""
    heads: tuple[HeadSource, ...]
    """Output layers of the teachers, which `teacher_B` counts; none for an estimator that does not
    read their hidden states. Those of teachers that rest are opened one at a time."""


def distill_loss(
    settings: LossSettings, hidden_ND: Tensor, head: Head, batch: Batch
) -> tuple[Tensor, Metrics]:
    """What an optimiser step descends, summed over tokens, for all teachers at once. A `HeadLoss`.

    The estimator's loss towards each row's teacher, and the policy gradient of the reward where
    that has a weight.
    """
    s, estimator = settings.step, settings.step.estimator
    # So that the tokens of each teacher are one stretch, to go through its output layer at once.
    hidden_ND, batch = in_order_of_teachers(hidden_ND, batch)
    weight_N = token_weights(s, batch)
    student: dict[str, Any] = {"bias_V": head.bias_V, "temperature": s.temperature}
    metrics: Metrics = {}
    if isinstance(estimator, SampledToken) or s.reward_weight > 0:
        logp_N, sampled_entropy_N = token_logprobs(
            hidden_ND, head.weight_VD, batch.targets_N, **student
        )
        # For the policy gradients only: a divergence does not depend on which token was sampled,
        # so it has nothing to correct.
        correction_N, metrics = importance_correction(
            logp_N,
            batch["sampler_logp_N"],
            row_N=batch.row_N,
            num_rows=len(batch),
            **correction_arguments(s.correction),
        )
    if isinstance(estimator, SampledToken):
        total, sums = sampled_token(
            logp_N,
            batch["teacher_logp_N"],
            weight_N,
            advantage_clip=estimator.clip,
            correction_N=correction_N,
        )
        # One sample of the reverse KL at each position; to be logged, so without a gradient.
        kl_N, entropy_N = (logp_N - batch["teacher_logp_N"]).detach(), sampled_entropy_N
        metrics |= {name: sums[name] for name in ("advantage_abs", "clipped")}
    elif isinstance(estimator, TopK):
        total, sums, values = top_k(
            hidden_ND,
            head.weight_VD,
            batch["teacher_ids_NK"],
            batch["teacher_logp_NK"],
            weight_N,
            **student,
        )
        kl_N, entropy_N = values["kl"], values["entropy"]
        metrics |= {name: sums[name] for name in ("student_mass", "teacher_mass")}
    else:
        total, _, values = full_vocabulary(
            hidden_ND,
            head.weight_VD,
            teacher_states(settings.heads, batch),
            weight_N,
            divergence=estimator.kind,
            jsd_beta=estimator.beta if isinstance(estimator, Jsd) else JSD_BETA,
            **student,
        )
        kl_N, entropy_N = values["kl"], values["entropy"]
    if s.reward_weight > 0:
        total = total + s.reward_weight * reward_loss(logp_N, weight_N, correction_N, batch)
        entropy_N = sampled_entropy_N
    metrics |= {"loss": total.detach()} | domain_sums(settings.domains, batch, kl_N, entropy_N)
    return total, metrics


def in_order_of_teachers(hidden_ND: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
    """The same rows with those of one teacher next to each other, teachers in order."""
    teacher_B = batch["teacher_B"]
    if bool((teacher_B.diff() >= 0).all()):
        return hidden_ND, batch
    order_B = teacher_B.argsort(stable=True)
    # The order of rows -> that of their sampled tokens.
    order_N = ragged_index(batch.sampled_len_B, order_B)
    return hidden_ND.index_select(0, order_N), batch.select(order_B)


def teacher_states(heads: Sequence[HeadSource], batch: Batch) -> list[TeacherStates]:
    """The hidden states of the teachers of the ordered rows, each beside its output layer."""
    # One per row -> one per token -> one for each stretch of tokens that share a teacher.
    of_each, count = batch["teacher_B"][batch.row_N].unique_consecutive(return_counts=True)
    states_NE = batch["teacher_hidden_NE"].split(count.tolist())
    states = []
    for number, hidden_NE in zip(of_each.tolist(), states_NE, strict=True):
        # A teacher narrower than the widest one fills the first places.
        own_NE = hidden_NE[:, : heads[number].shape[1]]
        states.append(TeacherStates(hidden_NE=own_NE, head_VE=heads[number]))
    return states


def reward_loss(logp_N: Tensor, weight_N: Tensor, correction_N: Tensor, batch: Batch) -> Tensor:
    """The policy gradient of the verifiable reward, as a sum over tokens."""
    # A ratio of the current policy to itself, which is 1: the plain policy gradient. What the
    # sampler did differently is in the correction.
    total, _ = policy_gradient(
        logp_N,
        logp_N.detach(),
        batch["advantage_B"][batch.row_N],
        weight_N,
        batch.row_N,
        num_rows=len(batch),
        ratio="token",
        clip_low=1.0,
        clip_high=1.0,
        correction_N=correction_N,
    )
    return total


def token_weights(step_settings: Distill, batch: Batch) -> Tensor:
    """`weight_N`: how much each token counts by the aggregation and by the weight of its row."""
    aggregation = step_settings.aggregation
    weight_N, _ = aggregation_weights(
        batch.row_N,
        len(batch),
        aggregation=aggregation.kind,
        constant=getattr(aggregation, "constant", None) or step_settings.max_new_tokens,
    )
    # From one weight per row to one per token.
    return weight_N * batch["loss_weight_B"][batch.row_N]


def domain_sums(domains: Sequence[str], batch: Batch, kl_N: Tensor, entropy_N: Tensor) -> Metrics:
    """`kl/DOMAIN`, `entropy/DOMAIN` and `tokens/DOMAIN`: sums over the domain's tokens."""
    domain_N = batch["domain_B"][batch.row_N]
    metrics: Metrics = {}
    values = {"kl": kl_N, "entropy": entropy_N, "tokens": torch.ones_like(kl_N)}
    for quantity, value_N in values.items():
        # One per token -> one per domain.
        sums = value_N.new_zeros(len(domains)).index_add(0, domain_N, value_N)
        metrics |= {f"{quantity}/{name}": sums[i] for i, name in enumerate(domains)}
    return metrics
