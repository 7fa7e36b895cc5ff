"""Reinforcement learning: GRPO, PPO and their relatives, on any reward.

Per step: draw prompts, sample a group of responses to each, judge them, turn the rewards of a
group into advantages, and take `updates_per_batch` policy-gradient steps. Every setting that has a
schedule is resolved first, so what follows reads the settings of this step.
Legend: B rows, N flat response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import methodcaller

import torch

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import load, save
from posttrain.backends.local import LocalLearner
from posttrain.backends.sampler import LocalSampler
from posttrain.rewards.judging import At, RewardFunction
from posttrain.rewards.pool import VerifierPool
from posttrain.rl.advantage import zero_variance
from posttrain.rl.kept import flat_index
from posttrain.schedules import learning_rate
from posttrain.stages import critique
from posttrain.stages.auxiliary import Auxiliary, take_metrics
from posttrain.stages.batches import Problem
from posttrain.stages.chains import chain_responses, sample_chains, sum_of
from posttrain.stages.context import Context
from posttrain.stages.credit import credit
from posttrain.stages.critic import Critic, learn_values, new_critic
from posttrain.stages.drawing import Drawing, Sample
from posttrain.stages.judging import make_reward
from posttrain.stages.learner import adapt, new_learner
from posttrain.stages.policy_update import PolicyUpdate, kl_weights, old_logprobs, reward_kl
from posttrain.stages.reference import Reference
from posttrain.stages.rollout_log import RolloutLog
from posttrain.stages.rollouts import Scored, equal_parts, verifiers
from posttrain.stages.settings.rl import Rl
from posttrain.stages.together import Together


def run(config: Rl, ctx: Context) -> dict[str, float]:
    """Train `start` on the prompts of its domains."""
    judges = verifiers(ctx)
    language_model = load(ctx.inputs["start"], device=ctx.device)
    chat = Chat(language_model)
    drawing = Drawing(config, ctx)
    learner = new_learner(config, language_model, ctx)
    reference = new_reference(config, ctx)
    aux: critique.Also = Auxiliary(config, config.seed, ctx, chat, language_model.pad_id)
    sampler, log = LocalSampler(learner.policy), RolloutLog(ctx.out)
    critic = None
    if config.uses_critic:
        start = ctx.inputs.get("critic", ctx.inputs["start"])
        critic = new_critic(config, start, language_model, ctx)
    judging = None
    if config.uses_critique:
        judging = aux = critique.Critique(config, language_model, aux)
    reward = new_reward(config, ctx, learner, judges)
    others = {"reference": reference, "critic": critic}
    state = Together(policy=learner, **{name: o for name, o in others.items() if o is not None})
    first = ctx.resume(state)
    drawing.resume(config, ctx.history, log.resume(first))
    for step in range(first, config.steps):
        now = config.at(step, config.steps, ctx.history)
        for trained in (learner, *([] if critic is None else [critic.learner])):
            adapt(trained, now)
        if reference is not None:
            reference.reset(step, learner)
        verify = partial(
            sample_chains,
            sampler,
            chat,
            judges=judges,
            segments=now.segments,
            chain=now.chain,
            max_new_tokens=now.max_new_tokens,
            temperature=now.temperature,
            top_p=now.top_p,
        )
        at = methodcaller("at", step, config.steps, ctx.history)
        parts: dict[str, list[float]] = {}
        sample = partial(sample_and_judge, reward, at, verify, parts, segments=now.segments)
        tokens, metrics = drawing.reprofile(now, step, ctx.history, verify)
        drawn = drawing.draw(now, step, sample)
        rows = log.write(
            step,
            drawn.sampled,
            model=ctx.name,
            temperature=now.temperature,
            judged=reward is not None,
            segments=now.segments,
        )
        metrics |= drawn.metrics | drawing.observe(now, rows) | now.scheduled()
        if judging is not None:
            metrics |= judging.take(now, step, rows)
        metrics |= learn(now, learner, reference, drawn.batch, step=step, critic=critic, aux=aux)
        metrics |= batch_metrics(drawn.sampled, judged=reward is not None, segments=now.segments)
        metrics |= {f"judge/{label}": sum(said) / len(said) for label, said in parts.items()}
        metrics["kept_share"] *= drawn.batch_share
        tokens += drawn.sampled.rollouts.num_tokens
        ctx.log(step + 1, config.steps, tokens=tokens, **metrics)
        ctx.checkpoint(step + 1, state)
    save(learner.result(), ctx.out)
    return {"reward": ctx.metrics["reward"], "tokens": ctx.tokens}


def new_reward(
    config: Rl, ctx: Context, learner: LocalLearner, pool: VerifierPool
) -> RewardFunction | None:
    """The judges of the reward, None where it is the verifier's score alone."""
    if config.verified_only:
        return None
    return make_reward(
        config.reward,
        ctx,
        policy=learner.policy,
        verifiers=pool,
        dtype=getattr(torch, config.precision),
        seed=config.seed,
    )


def sample_and_judge(
    reward: RewardFunction | None,
    at: At,
    verify: Sample,
    parts: dict[str, list[float]],
    problems: Sequence[Problem],
    *,
    segments: int,
    group_size: int,
    seed: int,
) -> Scored:
    """Verified samples, and then what the judges say as the reward; `at` resolves schedules.

    The rows of a chain of `segments` share what is said of it. `parts` collects by label what each
    judge inside the reward said.
    """
    scored = verify(problems, group_size=group_size, seed=seed)
    if reward is None:
        return scored
    scores, said = reward.score(chain_responses(scored, segments), at)
    for label, values in said.items():
        parts.setdefault(label, []).extend(values)
    reward_C = torch.tensor(scores, dtype=torch.float32)
    return replace(scored, reward_B=reward_C.repeat_interleave(segments))


def new_reference(config: Rl, ctx: Context) -> Reference | None:
    """The start as the reference, None where no step has a KL penalty."""
    if not config.uses_reference:
        return None
    return Reference(
        ctx.inputs["start"],
        every=config.reference_every,
        dtype=getattr(torch, config.precision),
        device=ctx.device,
    )


def learn(
    config: Rl,
    learner: LocalLearner,
    reference: Reference | None,
    scored: Scored,
    *,
    step: int,
    critic: Critic | None = None,
    aux: critique.Also | None = None,
) -> dict[str, float]:
    """All updates on one batch of scored rollouts; returns the step's metrics.

    The critic learns from the rows that the policy learns from, and first.
    """
    if not config.replay_mask:
        scored = replace(scored, rollouts=replace(scored.rollouts, kept=None))
    reference_logp_N, kl_N = None, None
    lr = learning_rate(config, step, config.steps)
    metrics = {"lr": lr}
    kl_weight_B = kl_weights(config, scored)
    if reference is not None:
        reference_logp_N = reference.logprobs(scored.rollouts, temperature=config.temperature)
        if config.kl_in == "reward":
            kl_N = reward_kl(config, scored, reference_logp_N)
            metrics["kl_reference"] = float(kl_N.sum()) / scored.rollouts.num_tokens
    kept_B = torch.ones_like(scored.reward_B, dtype=torch.bool)
    # A penalty in the loss has a gradient on every row, also where the rewards have none.
    penalised = config.kl_coef > 0 and config.kl_in == "loss"
    if config.drop_zero_variance and config.by_group and not penalised:
        kept_B = ~zero_variance(scored.reward_B, scored.group_B)
    if config.mask_unfinished:
        kept_B &= scored.rollouts.finished_B
    metrics["kept_share"] = float(kept_B.float().mean())
    if not bool(kept_B.any()):
        return metrics
    credits = credit(config, critic, scored, kept_B, kl_N=kl_N, kl_weight_B=kl_weight_B)
    index_B = kept_B.nonzero()[:, 0]
    cuts = equal_parts(len(index_B), config.updates_per_batch, seed=config.seed, step=step)
    parts = [index_B[part_B] for part_B in cuts]
    if critic is not None:
        metrics |= learn_values(config, critic, scored.rollouts, credits, parts, lr=lr)
        if step < config.critic_warmup_steps:
            return metrics
    old_logp_N = old_logprobs(config, learner, scored, parts)
    start_B = scored.rollouts.response_len_B.cumsum(0) - scored.rollouts.response_len_B
    sums: dict[str, float] = {}
    for number, rows_B in enumerate(parts):
        flat_N = flat_index(start_B, scored.rollouts.response_len_B, rows_B)
        # Before the first update the old policy is the current one: its forward pass serves both.
        current = number == 0 and config.correction != "none"
        update = PolicyUpdate(
            config,
            advantage_N=credits.advantage_N[flat_N],
            rows=scored.rollouts.rows(rows_B),
            old_logp_N=None if old_logp_N is None or current else old_logp_N[flat_N],
            reference_logp_N=None if reference_logp_N is None else reference_logp_N[flat_N],
            kl_weight_B=kl_weight_B[rows_B],
            device=learner.device,
        )
        also = (
            () if aux is None else aux.parts(step * config.updates_per_batch + number, config.aux)
        )
        part = learner.update(update.rows, update.loss, count=update.count, lr=lr, also=also)
        sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
    metrics["grad_norm"] = sums.pop("grad_norm") / len(parts)
    metrics |= take_metrics(sums, len(parts)) | critique.take_metrics(sums)
    tokens = sums.pop("tokens")
    return metrics | {name: value / tokens for name, value in sums.items()}


def batch_metrics(scored: Scored, *, judged: bool, segments: int = 1) -> dict[str, float]:
    """Reward, response length and finished share of a batch; reward by domain where several.

    Where other judges than the verifier were asked (`judged`), its mean score too."""
    rollouts = scored.rollouts
    metrics = {
        "reward": float(scored.reward_B.mean()),
        "response_length": float(rollouts.response_len_B.float().mean()),
        "finished_share": float(rollouts.finished_B.float().mean()),
    }
    if segments > 1:
        metrics["chain_length"] = float(sum_of(rollouts.response_len_B, segments).float().mean())
    if rollouts.kept is not None:
        metrics["nucleus_size"] = float(rollouts.kept.count_N.float().mean())
    if judged:
        metrics["accuracy"] = float(scored.verified_B.mean())
    by_domain: dict[str, list[float]] = {}
    for problem, reward in zip(scored.problems, scored.reward_B.tolist(), strict=True):
        by_domain.setdefault(problem["domain"], []).append(reward)
    if len(by_domain) > 1:
        metrics |= {f"reward/{d}": sum(r) / len(r) for d, r in by_domain.items()}
    return metrics
