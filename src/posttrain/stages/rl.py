"""Reinforcement learning: GRPO, PPO and their relatives, on any reward.

`run` is the algorithm: draw problems, sample a group of responses to each, judge them, turn rewards
into advantages, and take `num_minibatches` policy-gradient steps. `policy_loss` is what those steps
descend. `s` are the settings of the step, every schedule resolved.

Legend: B rows (responses), N sampled tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import methodcaller

import torch
from torch import Tensor

from posttrain.algorithms import (
    ConstantSum,
    Custom,
    Gae,
    Kimi,
    LeaveOneOutZScore,
    correction_arguments,
)
from posttrain.backends.base import Learner, Metrics, Sampler, Scorer, TokenLoss
from posttrain.backends.chat import Chat
from posttrain.backends.prompting import Problem
from posttrain.losses.ops import (
    aggregation_weights,
    kl_bounded,
    kl_estimate,
    kl_penalty,
    unbiased_kl_penalty,
)
from posttrain.report.samples import Sample
from posttrain.rewards.judging import RewardFunction
from posttrain.rewards.pool import VerifierPool
from posttrain.rl.advantage import advantages, whitened, zero_variance
from posttrain.rl.batch import Batch, Minibatch, concatenate
from posttrain.rl.corrections import importance_correction, off_policy_mask
from posttrain.rl.gae import gae, token_rewards
from posttrain.schedules import learning_rate
from posttrain.stages import critique
from posttrain.stages.aux_losses import AuxData, pop_metrics
from posttrain.stages.context import Context
from posttrain.stages.critic import Critic
from posttrain.stages.judging import judge_readers, make_reward, responses_of
from posttrain.stages.lengths import Reader, fit_prompts
from posttrain.stages.own_function import checked_sum, checked_values, named
from posttrain.stages.problems import ProblemSampler, reprofile_of
from posttrain.stages.rollout import minibatches, rollout, verified_mean, verifiers
from posttrain.stages.rollout_log import RolloutLog
from posttrain.stages.samples import of_rollout, shown_rows, token_means
from posttrain.stages.settings.rl import Rl
from posttrain.stages.signs import cut_responses


def run(settings: Rl, ctx: Context) -> dict[str, float]:
    """Train `start` on the prompts of its domains."""
    pool = verifiers(ctx)
    policy = ctx.learner(settings)
    sampler = ctx.sampler(policy)
    precision = settings.precision
    reference = None if settings.kl is None else ctx.scorer("start", precision=precision)
    critic = Critic(settings, ctx, policy, reference) if settings.uses_critic else None
    judge = None if settings.verified_only else reward_function(settings, ctx, policy)
    aux = AuxData(settings, ctx, policy.chat)
    verdicts = critique.CritiqueLoss(settings, policy.chat)
    log = RolloutLog(ctx.out)
    problems = ProblemSampler(settings, ctx, log, fitting(settings, ctx, policy, critic))
    # What a step checkpoint holds; a reference that never moves is read from the start again.
    every = None if settings.kl is None else settings.kl.reference_every
    parts = {"policy": policy, "reference": reference if every else None, "critic": critic}
    for step, s in ctx.steps(settings, settings.steps, replayed=[problems], **parts):
        sampler.sync(policy)
        if reference is not None and every and step > 0 and step % every == 0:
            reference.sync(policy)
        tokens, metrics = profile(s, ctx, step, problems, sampler, pool)

        draws: list[Batch] = []
        judged: dict[str, list[float]] = {}
        # Draw: with dynamic sampling again while groups of the batch have equal rewards.
        while asked := problems.draw(s, step, draws):
            # Roll out: a group of responses to each problem, verified as they end.
            drawn = sample(s, sampler, asked, pool, seed=problems.seed(s, step, len(draws)))
            # Judge: other judges than the verifier put their score in place of its own.
            if judge is not None:
                at = methodcaller("at", step, settings.steps, ctx.history)
                scores, said = judge.score(responses_of(drawn, step), at)
                drawn["reward_B"] = torch.tensor(scores, dtype=torch.float64)
                for label, values in said.items():
                    judged.setdefault(label, []).extend(values)
            draws.append(drawn)
        # All that was sampled is logged; what is learned from is one batch of the size asked for.
        sampled, batch = concatenate(draws), problems.batch(s, draws)
        rows = log.write(
            step, sampled, model=ctx.name, temperature=s.temperature, judged=judge is not None
        )
        metrics |= {f"judge/{label}": sum(given) / len(given) for label, given in judged.items()}
        # Observed from the rows of the log, which is what a resumed stage has of them.
        metrics |= problems.metrics(s, draws) | problems.observe(s, rows) | s.scheduled()

        # Score: the reference reads the tokens, over the nucleus that they were drawn from.
        batch = scored(s, batch, policy, reference)

        # Advantage: of every token.
        metrics |= add_advantages(s, batch, critic)
        batch["row_B"], batch["train_B"] = torch.arange(len(batch)), rows_to_train(s, batch)
        metrics["train_fraction"] = int(batch["train_B"].sum()) / len(sampled)

        # Update: first the critic, then the policy, on the same minibatches.
        lr = metrics["lr"] = learning_rate(s, step, settings.steps)
        shares = minibatches(s, batch, step)
        if critic is not None and shares:
            metrics |= critic.update(s, shares, lr=lr)
        compared, pairs = verdicts.losses(s, step, rows)
        metrics |= pairs
        if shares and not _critic_only(s, step):
            add_old_logprobs(s, policy, batch, shares)
            loss = TokenLoss(policy_loss, s, temperature=s.temperature)
            updates = []
            for part in shares:
                # Numbered through all steps, so that every update draws auxiliary rows of its own.
                further = aux.losses(step * s.num_minibatches + part.number, s)
                further = [*further, *compared[part.number]]
                updates.append(policy.update(part.rows, loss, count=part.count, lr=lr, aux=further))
            metrics |= per_token(updates)

        # Log.
        metrics |= batch_metrics(sampled, judged=judge is not None)
        ctx.log(step + 1, settings.steps, tokens=tokens + sampled.num_tokens, **metrics)
        if ctx.samples.due(step + 1, settings.steps):
            ctx.samples.write(step + 1, samples(batch, policy.chat))
        cut_responses(ctx, ctx.history("finished_share"), s.steps, s.max_new_tokens, policy.chat)
    policy.finish()
    policy.save(ctx.out)
    return {"reward": ctx.metrics["reward"], "tokens": ctx.tokens}


def samples(batch: Batch, chat: Chat) -> list[Sample]:
    """A few rows of the step: reward, advantage (mean over tokens), and one sample of the KL to the
    reference in nats per token."""
    few = shown_rows(batch)
    values = {"reward": few["reward_B"], "advantage": token_means(few["advantage_N"], few)}
    if "ref_logp_N" in few:
        values["kl"] = token_means(few["sampler_logp_N"] - few["ref_logp_N"], few)
    return of_rollout(few, chat, **values)


def fitting(
    settings: Rl, ctx: Context, policy: Learner, critic: Critic | None
) -> dict[str, list[Problem]]:
    """The problems of all domains that policy, critic and judges can read with their responses.
    The reference is the policy's start, and as long."""
    readers = [Reader(name="the policy", chat=policy.chat)]
    if critic is not None:
        # It has the policy's tokens, so that nothing is encoded twice.
        positions = critic.learner.chat.max_positions
        readers.append(Reader(name="the critic", chat=policy.chat, positions=positions))
    readers += judge_readers(settings.reward, ctx)
    problems = {name: ctx.problems(name, "train", settings.modes) for name in ctx.domains}
    new_tokens = round(max(settings.possible("max_new_tokens")))
    return fit_prompts(problems, settings, ctx, readers, new_tokens=new_tokens)


def _critic_only(s: Rl, step: int) -> bool:
    return isinstance(s.advantage, Gae) and step < s.advantage.warmup_steps


def sample(
    s: Rl,
    sampler: Sampler,
    problems: Sequence[dict[str, object]],
    pool: VerifierPool,
    *,
    seed: int,
    group_size: int | None = None,
) -> Batch:
    """Verified responses to these problems, with the sampling settings of the step."""
    return rollout(
        sampler,
        problems,
        pool,
        group_size=s.group_size if group_size is None else group_size,
        max_new_tokens=s.max_new_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        seed=seed,
    )


def profile(
    s: Rl,
    ctx: Context,
    step: int,
    problems: ProblemSampler,
    sampler: Sampler,
    pool: VerifierPool,
) -> tuple[int, dict[str, float]]:
    """Where it is time to, learn anew how often the policy solves which problems; returns the
    tokens that this took, and metrics."""
    how = reprofile_of(s)
    if how is None:
        return 0, {}
    profiled = [
        sample(s, sampler, asked, pool, seed=seed, group_size=how.samples)
        for asked, seed in problems.to_profile(s, step, ctx.history)
    ]
    count = problems.take_profile(s, step, profiled)
    return sum(batch.num_tokens for batch in profiled), {"profiled": float(count)}


def reward_function(settings: Rl, ctx: Context, policy: Learner) -> RewardFunction:
    """The judge of the settings, ready to be asked."""
    return make_reward(
        settings.reward,
        ctx,
        policy=policy,
        precision=settings.precision,
        seed=settings.seed,
        cut=settings.on_long == "truncate",
    )


def scored(s: Rl, batch: Batch, policy: Learner, reference: Scorer | None) -> Batch:
    """The batch with `kl_weight_B` and, where there is a reference, its `ref_logp_N`.

    For a KL in the reward also `policy_logp_N`, over the same tokens as the reference's: the
    sampler's may be over a nucleus, which is left out without `replay_mask`.
    """
    if not s.replay_mask:
        batch = batch.without("nucleus_count_N", "nucleus_ids_F")
    batch["kl_weight_B"] = kl_weights(s, batch)
    if s.kl is not None and reference is not None:
        batch["ref_logp_N"] = reference.logprobs(batch, temperature=s.temperature)
        if s.kl.where == "reward":
            batch["policy_logp_N"] = (
                batch["sampler_logp_N"]
                if s.replay_mask or s.top_p == 1
                else policy.logprobs(batch, temperature=s.temperature)
            )
    return batch


def kl_weights(s: Rl, batch: Batch) -> Tensor:
    """`kl_weight_B`: the factor on the KL's coefficient of each row's domain, 1 where none is
    given."""
    factors = {} if s.kl is None else s.kl.domains
    weights = [factors.get(problem["domain"], 1.0) for problem in batch.problems]
    return torch.tensor(weights, dtype=torch.float32)


def add_advantages(s: Rl, batch: Batch, critic: Critic | None) -> dict[str, float]:
    """Give every sampled token of the batch its `advantage_N`; returns metrics.

    With a critic also `return_N` and `old_value_N`, what it is to learn and its values before the
    updates. A KL in the reward is taken off the reward at the token where it arises for a critic
    (InstructGPT, arXiv 2203.02155, Eq. 2), and as a sum over the response elsewhere. The advantages
    of a critic are whitened over the tokens of the rows that are trained on.
    """
    row_N, reward_B, metrics = batch.row_N, batch["reward_B"].float(), {}
    kl_N = scale_B = None
    if s.kl is not None and s.kl.where == "reward":
        assert s.kl.estimator != "unbiased", "refused with where = reward"
        # Before any update: as a part of the reward the KL has no gradient of its own.
        kl_N = kl_estimate(batch["policy_logp_N"], batch["ref_logp_N"], estimator=s.kl.estimator)
        scale_B = s.kl.coef * batch["kl_weight_B"]
        metrics["kl_reference"] = float(kl_N.sum()) / batch.num_tokens
        beyond = kl_bounded(batch["policy_logp_N"], batch["ref_logp_N"], estimator=s.kl.estimator)
        metrics["kl_bounded"] = float(beyond) / batch.num_tokens
    if isinstance(s.advantage, Gae):
        assert critic is not None, "generalised advantage estimation has a critic"
        # From one coefficient per row to one per token.
        penalty_N = None if kl_N is None or scale_B is None else scale_B[row_N] * kl_N
        value_N = critic.values(batch)
        advantage_N, batch["return_N"] = gae(
            token_rewards(reward_B, row_N, penalty_N),
            value_N,
            row_N,
            num_rows=len(batch),
            gamma=s.advantage.gamma,
            lam=s.advantage.lam,
        )
        # From one flag per row to one per token.
        trained_N = rows_to_train(s, batch)[row_N]
        batch["advantage_N"] = advantage_N.masked_scatter(
            trained_N, whitened(advantage_N[trained_N])
        )
        batch["old_value_N"] = value_N
        return metrics
    if kl_N is not None and scale_B is not None:
        # Summed over the tokens of each row.
        kl_B = torch.zeros_like(reward_B).index_add(0, row_N, kl_N)
        reward_B = reward_B - scale_B * kl_B
    if isinstance(s.advantage, Custom):
        with named(s.advantage):
            own, more = s.advantage.implementation(), s.advantage.arguments()
            advantage = own(reward_B, batch["group_B"], **more)
            advantage = checked_values(s.advantage, advantage, len(batch), batch.num_tokens)
        # Of responses, which their tokens share, or of tokens.
        by_row = len(advantage) == len(batch)
        batch["advantage_N"] = advantage[row_N] if by_row else advantage
    elif isinstance(s.advantage, LeaveOneOutZScore):
        advantage_B = advantages(reward_B, batch["group_B"], mode="leave_one_out")
        # Whitened over rows, each of which counts once; then one per row -> one per token.
        batch["advantage_N"] = whitened(advantage_B)[row_N]
    else:
        advantage_B = advantages(reward_B, batch["group_B"], mode=s.advantage.kind)
        # One per row -> one per sampled token.
        batch["advantage_N"] = advantage_B[row_N]
    return metrics


def rows_to_train(s: Rl, batch: Batch) -> Tensor:
    """bool for each row: whether the policy learns from it."""
    train_B = torch.ones(len(batch), dtype=torch.bool)
    if s.drop_zero_variance and s.by_group and not _learns_without_contrast(s):
        train_B = ~zero_variance(batch["reward_B"].float(), batch["group_B"])
    if s.mask_unfinished:
        train_B &= batch["finished_B"]
    return train_B


def _learns_without_contrast(s: Rl) -> bool:
    """Whether a row may have a gradient where all rewards of its group are alike, so that leaving
    it out would change what is descended."""
    # A penalty has one on every row: in the loss by itself, in the reward as what tells rows apart.
    penalised = s.kl is not None and s.kl.coef > 0
    # Kimi's loss pulls back what earlier updates on the batch have moved, also with A = 0, and of
    # a function of the user's own nobody knows.
    pulls = isinstance(s.surrogate, Kimi) and s.num_minibatches > 1
    return penalised or pulls or isinstance(s.surrogate, Custom)


def add_old_logprobs(
    s: Rl, policy: Learner, batch: Batch, minibatches: Sequence[Minibatch]
) -> None:
    """Give the minibatches `old_logp_N`, the log-probs of the policy before the first update.

    None needs them with one update, where the old policy is the current one and the ratio is
    exactly 1. With several, the sampler has just reported them. Where a correction compares the two
    engines the learner computes its own, for the rows of all updates but the first, whose forward
    pass serves both.
    """
    if s.num_minibatches == 1:
        return
    if s.correction is None:
        for part in minibatches:
            part.rows["old_logp_N"] = part.rows["sampler_logp_N"]
    elif len(minibatches) > 1:
        # Row numbers of the batch, ascending: neighbours share their prompts' forward pass.
        row_B = torch.cat([part.rows["row_B"] for part in minibatches[1:]]).sort().values
        later = batch.select(row_B)
        later["old_logp_N"] = policy.logprobs(later, temperature=s.temperature)
        for part in minibatches[1:]:
            # Where the rows of this minibatch stand in `later`.
            place_B = torch.searchsorted(row_B, part.rows["row_B"])
            part.rows["old_logp_N"] = later.select(place_B)["old_logp_N"]


def per_token(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metric sums of a step's updates as means over tokens; those of further losses and the
    gradient norm over updates."""
    sums: dict[str, float] = {}
    for found in updates:
        sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
    # Taken out first: what is left in the end are sums over tokens.
    metrics = {"grad_norm": sums.pop("grad_norm") / len(updates)}
    metrics |= pop_metrics(sums, len(updates)) | critique.pop_metrics(sums)
    tokens = sums.pop("tokens")
    return metrics | {name: value / tokens for name, value in sums.items()}


def policy_loss(s: Rl, logp_N: Tensor, entropy_N: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
    """What a policy-gradient step descends, summed over tokens. A `TokenLoss`.

    The surrogate on the advantages, corrected for what sampler and learner differ in, and the KL
    penalty where it belongs to the loss.
    """
    row_N, num_rows, advantage_N = batch.row_N, len(batch), batch["advantage_N"]
    # Where it is missing the current policy is the old one: a ratio of 1 that has a gradient.
    old_logp_N = batch["old_logp_N"] if "old_logp_N" in batch else logp_N.detach()
    weight_N, _ = aggregation_weights(
        row_N, num_rows, aggregation=s.aggregation.kind, constant=constant_of(s)
    )
    # Between learner and sampler before the updates; what these change is in the ratio.
    correction_N, metrics = importance_correction(
        old_logp_N,
        batch["sampler_logp_N"],
        row_N=row_N,
        num_rows=num_rows,
        **correction_arguments(s.correction),
    )
    if s.off_policy_delta is not None:
        mask_N, masked = off_policy_mask(
            logp_N, old_logp_N, advantage_N, row_N, num_rows=num_rows, delta=s.off_policy_delta
        )
        correction_N, metrics = correction_N * mask_N, metrics | masked
    with named(s.surrogate):
        surrogate = s.surrogate.implementation()
        found = surrogate(
            logp_N,
            old_logp_N,
            advantage_N,
            token_weights(s, batch, weight_N),
            row_N,
            num_rows=num_rows,
            correction_N=correction_N,
            **s.surrogate.arguments(),
        )
        total, own = checked_sum(s.surrogate, found, logp_N)
    metrics |= own | {"entropy": entropy_N.sum(), "tokens": logp_N.new_tensor(float(len(logp_N)))}
    if s.kl is not None and s.kl.where == "loss":
        # Not of `token_weights`: the user's factor is for the surrogate alone.
        kl_weight_N = weight_N * batch["kl_weight_B"][row_N]
        if s.kl.estimator == "unbiased":
            penalty, own = unbiased_kl_penalty(logp_N, old_logp_N, batch["ref_logp_N"], kl_weight_N)
        else:
            penalty, own = kl_penalty(
                logp_N, batch["ref_logp_N"], kl_weight_N, estimator=s.kl.estimator
            )
        total = total + s.kl.coef * penalty
        metrics |= {"kl_reference": own["kl"], "kl_bounded": own["kl_bounded"]}
    return total, metrics


def token_weights(s: Rl, batch: Batch, weight_N: Tensor) -> Tensor:
    """The weights of the aggregation, times those of the user's own function where there is one."""
    if s.token_weight is None:
        return weight_N
    with named(s.token_weight):
        weigh, more = s.token_weight.implementation(), s.token_weight.arguments()
        factor_N = checked_values(s.token_weight, weigh(batch, **more), batch.num_tokens)
    return weight_N * factor_N


def constant_of(s: Rl) -> int:
    """The constant of a `ConstantSum`, the limit on response tokens where it has none."""
    constant = s.aggregation.constant if isinstance(s.aggregation, ConstantSum) else None
    return constant or s.max_new_tokens


def batch_metrics(batch: Batch, *, judged: bool) -> dict[str, float]:
    """Reward, response length and finished share of a batch; reward by domain where several.

    Where other judges than the verifier were asked (`judged`), its mean score too, over the rows
    that it was asked about."""
    metrics = {
        "reward": float(batch["reward_B"].mean()),
        "response_length": float(batch.sampled_len_B.float().mean()),
        "finished_share": float(batch["finished_B"].float().mean()),
    }
    if "nucleus_count_N" in batch:
        metrics["nucleus_size"] = float(batch["nucleus_count_N"].float().mean())
    accuracy = verified_mean(batch["verified_B"]) if judged else None
    if accuracy is not None:
        metrics["accuracy"] = accuracy
    by_domain: dict[str, list[float]] = {}
    for problem, reward in zip(batch.problems, batch["reward_B"].tolist(), strict=True):
        by_domain.setdefault(problem["domain"], []).append(reward)
    if len(by_domain) > 1:
        metrics |= {f"reward/{d}": sum(r) / len(r) for d, r in by_domain.items()}
    return metrics
