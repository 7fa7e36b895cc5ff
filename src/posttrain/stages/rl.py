"""Reinforcement learning on verifiable rewards: GRPO, with its published variants as settings.

Per step: draw prompts, sample a group of responses to each, verify them, turn the rewards of a
group into advantages, and take `updates_per_batch` clipped policy-gradient steps.
Left out here: critics, dynamic sampling, curricula. Legend: B rows, N flat response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.backends.base import Head, Metrics, MicroBatch
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import load, save
from posttrain.backends.local import (
    LocalLearner,
    LocalScorer,
    flat_index,
    response_logprobs,
    response_targets,
)
from posttrain.backends.sampler import LocalSampler
from posttrain.losses.ops import aggregation_weights, kl_estimate, token_logprobs
from posttrain.losses.policy import kl_penalty, policy_gradient
from posttrain.rl.advantage import advantages, zero_variance
from posttrain.rl.corrections import importance_correction
from posttrain.rl.types import Rollouts
from posttrain.schedules import learning_rate
from posttrain.stages.batches import Pool
from posttrain.stages.context import Context
from posttrain.stages.learner import new_learner
from posttrain.stages.rollouts import (
    Scored,
    equal_parts,
    sample_and_verify,
    step_seed,
    verifiers,
)
from posttrain.stages.settings.rl import Rl


def run(config: Rl, ctx: Context) -> dict[str, float]:
    """Train `start` on the prompts of its domains."""
    judges = verifiers(ctx)
    dtype = getattr(torch, config.precision)
    language_model = load(ctx.inputs["start"], device=ctx.device)
    chat = Chat(language_model)
    reference = None
    if config.kl_coef > 0:
        reference = LocalScorer(load(ctx.inputs["start"], dtype=dtype, device=ctx.device))
    pool = Pool(
        {name: ctx.problems(name, "train", config.modes) for name in ctx.domains}, seed=config.seed
    )
    learner = new_learner(config, language_model, ctx)
    sampler = LocalSampler(learner.policy)
    for step in range(ctx.resume(learner), config.steps):
        scored = sample_and_verify(
            sampler,
            chat,
            pool.draw(step, config.prompts_per_step),
            judges,
            group_size=config.group_size,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=step_seed(config.seed, step),
        )
        lr = learning_rate(config, step, config.steps)
        metrics = learn(config, learner, reference, scored, lr=lr, step=step)
        ctx.log(step + 1, config.steps, tokens=scored.rollouts.num_tokens, **metrics)
        ctx.checkpoint(step + 1, learner)
    save(language_model, ctx.out)
    return {"reward": ctx.metrics["reward"], "tokens": ctx.tokens}


def learn(
    config: Rl,
    learner: LocalLearner,
    reference: LocalScorer | None,
    scored: Scored,
    *,
    lr: float,
    step: int,
) -> dict[str, float]:
    """All updates on one batch of scored rollouts; returns the step's metrics."""
    reward_B, reference_logp_N = scored.reward_B, None
    metrics = batch_metrics(scored) | {"lr": lr}
    if reference is not None:
        hidden_ND = reference.hidden(scored.rollouts)
        reference_logp_N = response_logprobs(
            hidden_ND, reference.head, scored.rollouts, config.temperature
        )
        if config.kl_in == "reward":
            kl_B = reward_kl(config, scored, reference_logp_N)
            reward_B = reward_B - config.kl_coef * kl_B
            metrics["kl_reference"] = float(kl_B.sum()) / scored.rollouts.num_tokens
    advantage_B = advantages(reward_B, scored.group_B, mode=config.advantage)
    kept_B = torch.ones_like(reward_B, dtype=torch.bool)
    # A penalty in the loss has a gradient on every row, also where the rewards have none.
    if config.drop_zero_variance and not (config.kl_coef > 0 and config.kl_in == "loss"):
        kept_B = ~zero_variance(scored.reward_B, scored.group_B)
    metrics["kept_share"] = float(kept_B.float().mean())
    if not bool(kept_B.any()):
        return metrics
    index_B = kept_B.nonzero()[:, 0]
    cuts = equal_parts(len(index_B), config.updates_per_batch, seed=config.seed, step=step)
    parts = [index_B[part_B] for part_B in cuts]
    old_logp_N = old_logprobs(config, learner, scored, parts)
    start_B = scored.rollouts.response_len_B.cumsum(0) - scored.rollouts.response_len_B
    sums: dict[str, float] = {}
    for number, rows_B in enumerate(parts):
        flat_N = flat_index(start_B, scored.rollouts.response_len_B, rows_B)
        # Before the first update the old policy is the current one: its forward pass serves both.
        current = number == 0 and config.correction != "none"
        update = PolicyUpdate(
            config,
            advantage_B=advantage_B[rows_B],
            rows=scored.rollouts.rows(rows_B),
            old_logp_N=None if old_logp_N is None or current else old_logp_N[flat_N],
            reference_logp_N=None if reference_logp_N is None else reference_logp_N[flat_N],
            device=learner.device,
        )
        part = learner.update(update.rows, update.loss, count=update.count, lr=lr)
        sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
    metrics["grad_norm"] = sums.pop("grad_norm") / len(parts)
    tokens = sums.pop("tokens")
    return metrics | {name: value / tokens for name, value in sums.items()}


class PolicyUpdate:
    """The rows of one optimiser step with the constants of their loss, which are on `device`."""

    def __init__(
        self,
        config: Rl,
        *,
        advantage_B: Tensor,
        rows: Rollouts,
        old_logp_N: Tensor | None,
        reference_logp_N: Tensor | None,
        device: torch.device,
    ) -> None:
        self.config, self.rows = config, rows
        self.advantage_B = advantage_B.to(device)
        self.old_logp_N = None if old_logp_N is None else old_logp_N.to(device)
        self.reference_logp_N = None
        if reference_logp_N is not None:
            self.reference_logp_N = reference_logp_N.to(device)
        self.constant = config.aggregation_constant or config.max_new_tokens
        self.sampler_logp_N = rows.sampler_logp_N().to(device)
        length_B = rows.response_len_B
        self.length_B = length_B.to(device)
        self.start_B = (length_B.cumsum(0) - length_B).to(device)
        self.count = float(length_B.sum() if config.aggregation == "token" else len(length_B))

    def loss(self, hidden_ND: Tensor, head: Head, part: MicroBatch) -> tuple[Tensor, Metrics]:
        """The clipped surrogate, plus the KL penalty where it belongs to the loss."""
        config, length_B = self.config, part.rollouts.response_len_B
        row_N = part.rollouts.row_N()
        flat_N = flat_index(self.start_B, self.length_B, part.index_B)
        logp_N, entropy_N = token_logprobs(
            hidden_ND,
            head.weight_VD,
            response_targets(part.rollouts),
            bias_V=head.bias_V,
            temperature=config.temperature,
        )
        weight_N, _ = aggregation_weights(
            row_N, len(length_B), aggregation=config.aggregation, constant=self.constant
        )
        old_logp_N = logp_N.detach() if self.old_logp_N is None else self.old_logp_N[flat_N]
        correction_N, metrics = importance_correction(
            old_logp_N,
            self.sampler_logp_N[flat_N],
            mode=config.correction,
            low=config.correction_low,
            high=config.correction_high,
        )
        total, policy_metrics = policy_gradient(
            logp_N,
            old_logp_N,
            self.advantage_B[part.index_B][row_N],
            weight_N,
            row_N,
            num_rows=len(length_B),
            ratio=config.ratio,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            correction_N=correction_N,
        )
        metrics = metrics | policy_metrics | {"entropy": entropy_N.sum()}
        if self.reference_logp_N is not None and config.kl_in == "loss":
            penalty, penalty_metrics = kl_penalty(
                logp_N,
                self.reference_logp_N[flat_N],
                weight_N,
                estimator=config.kl_estimator,
            )
            total = total + config.kl_coef * penalty
            metrics["kl_reference"] = penalty_metrics["kl"]
        metrics["tokens"] = logp_N.new_tensor(float(len(logp_N)))
        return total, metrics


def old_logprobs(
    config: Rl, learner: LocalLearner, scored: Scored, parts: list[Tensor]
) -> Tensor | None:
    """`logp_N` of the whole batch under the policy before the first of its updates on `parts`.

    None with one update, where the old policy is the current one and the ratio is exactly 1. With
    several, the sampler has just reported the log-probs; where a correction compares the two
    engines the learner computes its own, for the rows of all updates but the first.
    """
    if config.updates_per_batch == 1:
        return None
    rollouts = scored.rollouts
    if config.correction == "none":
        return rollouts.sampler_logp_N()
    logp_N = torch.zeros(rollouts.num_tokens)
    if len(parts) > 1:
        later_B = torch.cat(parts[1:]).sort().values
        length_B = rollouts.response_len_B
        flat_N = flat_index(length_B.cumsum(0) - length_B, length_B, later_B)
        later = rollouts.rows(later_B)
        logp_N[flat_N] = learner.logprobs(later, temperature=config.temperature)
    return logp_N


def reward_kl(config: Rl, scored: Scored, reference_logp_N: Tensor) -> Tensor:
    """`kl_B`: the estimate of KL(policy || reference) summed over each response."""
    kl_N = kl_estimate(
        scored.rollouts.sampler_logp_N(), reference_logp_N, estimator=config.kl_estimator
    )
    return torch.zeros(len(scored.rollouts)).index_add(0, scored.rollouts.row_N(), kl_N)


def batch_metrics(scored: Scored) -> dict[str, float]:
    """Reward, response length and finished share of a batch; reward by domain where several."""
    rollouts = scored.rollouts
    metrics = {
        "reward": float(scored.reward_B.mean()),
        "response_length": float(rollouts.response_len_B.float().mean()),
        "finished_share": float(rollouts.finished_B.float().mean()),
    }
    by_domain: dict[str, list[float]] = {}
    for problem, reward in zip(scored.problems, scored.reward_B.tolist(), strict=True):
        by_domain.setdefault(problem["domain"], []).append(reward)
    if len(by_domain) > 1:
        metrics |= {f"reward/{d}": sum(r) / len(r) for d, r in by_domain.items()}
    return metrics
