"""Rows in which the policy spoke several times, with text between that it did not sample: every
loss, advantage and correction is what a hand computation makes of the sampled tokens alone.

The hand computations are plain transformers, one row at a time, and loops over rows. They never see
a token that was not sampled but as context, so such a token has neither weight nor gradient.

Legend: B rows, T positions, N sampled tokens, V vocabulary, P pairs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.algorithms import (
    KL,
    Cispo,
    Clip,
    ConstantSum,
    Dpo,
    DpoNorm,
    Gae,
    Gmpo,
    IcePop,
    Jsd,
    Kimi,
    SampledToken,
    TopK,
    Truncated,
)
from posttrain.backends.base import HeadLoss, LearnerSettings, Loss, TokenLoss
from posttrain.backends.checkpoint import LanguageModel, save
from posttrain.backends.local import LocalLearner, LocalScorer
from posttrain.backends.scalar import load_scalar
from posttrain.rl.batch import Batch
from posttrain.stages.aux_losses import token_cross_entropy
from posttrain.stages.critic import value_loss
from posttrain.stages.critique import verdict_loss
from posttrain.stages.distill import LossSettings, distill_loss
from posttrain.stages.dpo import preference_loss
from posttrain.stages.rl import add_advantages, policy_loss
from posttrain.stages.settings.distill import Distill
from posttrain.stages.settings.rl import Rl
from posttrain.stages.teachers import teacher_columns

SPOKEN = ((3, 2), (1, 1, 3), (4,), (2, 3))
"""Sampled tokens of each turn of each row: 5, 5, 4 and 5 of them."""
COUNTS = [5, 5, 4, 5]
PROMPTS = [[11, 12, 13], [11, 12, 13], [20, 21, 22, 23, 24], [20, 21, 22, 23, 24]]
SETTINGS = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1e9)
MakeModel = Callable[..., LanguageModel]


def turns() -> Batch:
    """Two groups of two rows. Between turns stand two tokens that were not sampled; in the second
    and the last row such tokens stand at the end as well."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 90, (count,), generator=generator).tolist()

    rows: list[list[tuple[Sequence[int], bool]]] = []
    for number, (prompt, counts) in enumerate(zip(PROMPTS, SPOKEN, strict=True)):
        spans: list[tuple[Sequence[int], bool]] = [(prompt, False)]
        for count in counts:
            spans += [(ids(count), True), (ids(2), False)]
        rows.append(spans if number % 2 else spans[:-1])
    batch = Batch.from_spans(rows, pad_id=0, problems=[{"domain": "d"}] * 4)
    batch["group_B"] = torch.tensor([0, 0, 1, 1])
    batch["reward_B"] = torch.tensor([1.0, 0.0, 0.5, 0.25])
    batch["finished_B"] = torch.ones(4, dtype=torch.bool)
    return batch


def sampled_logits(model: Any, batch: Batch) -> Tensor:
    """`logits_NV` that predict the sampled tokens, by transformers alone, one row at a time."""
    parts = []
    for row, row_T in enumerate(batch.tokens_BT):
        length = int(batch.length_B[row])
        logits_TV = model(input_ids=row_T[None, :length], use_cache=False).logits[0]
        parts.append(logits_TV[:-1][batch.sampled_BT[row, 1:length]].float())
    return torch.cat(parts)


def sampled_logprobs(model: Any, batch: Batch) -> Tensor:
    logp_NV = sampled_logits(model, batch).log_softmax(-1)
    return logp_NV.gather(1, batch.targets_N[:, None])[:, 0]


def check(
    language_model: LanguageModel,
    batch: Batch,
    loss: Loss,
    by_hand: Callable[[Any], Tensor],
    *,
    count: float,
    group_rows: int = 1,
) -> dict[str, float]:
    """That a learner has the gradients, and takes the step, of a sum that `by_hand(model)` is;
    rows are read in several forward passes. Returns the learner's metrics."""
    model = language_model.model
    (by_hand(model) / count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain.step()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.load_state_dict(before, strict=False)

    learner = LocalLearner(language_model, SETTINGS, max_tokens=30)
    seen: dict[str, Tensor] = {}
    learner.optimizer.adamw.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    sums = learner.update(batch, loss, count=count, lr=1e-3, group_rows=group_rows)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-4
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen[name], expected[name], atol=2e-5 * largest, rtol=0)
        # AdamW's first step has the size of lr wherever the gradient is not as good as 0.
        clear = expected[name].abs() > 1e-3 * largest
        torch.testing.assert_close(parameter[clear], after[name][clear], atol=1e-5, rtol=0)
    return sums


# Reinforcement learning.


def with_logprobs(batch: Batch, model: Any) -> Batch:
    """With the columns of a rollout that is learned from, each some way off from the others."""
    generator = torch.Generator().manual_seed(1)

    def near(logp_N: Tensor, distance: float) -> Tensor:
        return logp_N + distance * torch.randn(len(logp_N), generator=generator)

    with torch.no_grad():
        logp_N = sampled_logprobs(model, batch)
    batch["old_logp_N"] = near(logp_N, 0.2)
    batch["sampler_logp_N"] = near(batch["old_logp_N"], 0.1)
    batch["policy_logp_N"] = batch["sampler_logp_N"]
    batch["ref_logp_N"] = near(logp_N, 0.5)
    batch["kl_weight_B"] = torch.tensor([1.0, 0.5, 2.0, 0.0])
    batch["advantage_N"] = torch.tensor([1.5, -1.0, 0.5, -0.5])[batch.row_N]
    return batch


def policy_by_hand(s: Rl, logp_N: Tensor, batch: Batch) -> Tensor:
    """The loss by the formulas of the papers, row by row."""
    columns = ("old_logp_N", "sampler_logp_N", "ref_logp_N", "advantage_N")
    split = [logp_N.split(COUNTS), *(batch[name].split(COUNTS) for name in columns)]
    total = torch.zeros(())
    for row, (logp, old, sampler, reference, advantage) in enumerate(zip(*split, strict=True)):
        weight = {"token": 1.0, "sequence": 1 / len(logp), "constant": 1 / 7}[s.aggregation.kind]
        off = (old - sampler).sum() if getattr(s.correction, "sequence", False) else old - sampler
        factor = off.exp().expand(len(logp))
        if s.correction is None:
            factor = torch.ones(len(logp))
        elif isinstance(s.correction, Truncated):
            factor = factor.clamp(max=s.correction.high)
        else:
            inside = (factor >= s.correction.low) & (factor <= s.correction.high)
            factor = factor * inside
        if s.off_policy_delta is not None and advantage[0] < 0:
            factor = factor * ((old - logp).detach().mean() <= s.off_policy_delta)
        total = (
            total + weight * (factor * surrogate_by_hand(s.surrogate, logp, old, advantage)).sum()
        )
        if s.kl is not None:
            total = total + weight * batch["kl_weight_B"][row] * kl_by_hand(
                s.kl, logp, old, reference
            )
    return total


def surrogate_by_hand(how: Any, logp: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    difference = logp - old
    ratio = getattr(how, "ratio", "token")
    whole = {"token": difference, "sequence": difference.mean(), "product": difference.sum()}[ratio]
    r = whole.exp().expand(len(logp))
    if isinstance(how, Clip):
        bounded = r.clamp(1 - how.clip_low, 1 + how.clip_high)
        loss = -torch.minimum(r * advantage, bounded * advantage)
        if how.dual_clip is not None and advantage[0] < 0:
            loss = loss.clamp(max=-how.dual_clip * float(advantage[0]))
        return loss
    if isinstance(how, Cispo):
        return -r.clamp(1 - how.clip_low, 1 + how.clip_high).detach() * advantage * logp
    if isinstance(how, Gmpo):
        up = bool(advantage[0] > 0)
        cut = difference.clamp(max=how.clip_high) if up else difference.clamp(min=-how.clip_low)
        return -cut.mean().exp() * advantage
    return (advantage - how.tau * difference.sum()) ** 2 / (2 * how.tau)


def kl_by_hand(kl: KL, logp: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    d = logp - reference
    k3 = (-d).exp() - 1 + d
    by_name = {"k2": d**2 / 2, "k3": k3, "unbiased": (logp - old).exp() * k3}
    return kl.coef * by_name[kl.estimator].sum()


POLICY: dict[str, dict[str, Any]] = {
    "clip": {"surrogate": Clip(0.1, 0.1)},
    "dual": {"surrogate": Clip(0.1, 0.1, dual_clip=1.05)},
    "clip, sequence": {"surrogate": Clip(0.05, 0.05, ratio="sequence")},
    "clip, product": {"surrogate": Clip(ratio="product"), "aggregation": "sequence"},
    "cispo": {"surrogate": Cispo(clip_high=0.1), "aggregation": ConstantSum(7)},
    "cispo, sequence": {"surrogate": Cispo(clip_high=0.05, ratio="sequence")},
    "gmpo": {"surrogate": Gmpo(0.05, 0.05), "aggregation": "sequence"},
    "kimi": {"surrogate": Kimi(0.5), "aggregation": "sequence"},
    "truncated": {"correction": Truncated(1.02)},
    "icepop": {"correction": IcePop(0.95, 1.05)},
    "truncated rows": {"correction": Truncated(1.02, sequence=True)},
    "icepop rows": {"correction": IcePop(0.8, 1.1, sequence=True)},
    "off-policy mask": {"off_policy_delta": 0.02},
    "k2": {"kl": KL(0.5, estimator="k2")},
    "k3": {"kl": KL(0.5), "aggregation": ConstantSum(7)},
    "unbiased": {"kl": KL(0.5, estimator="unbiased"), "aggregation": "sequence"},
}


@pytest.mark.parametrize("case", POLICY)
def test_the_policy_loss(make_model: MakeModel, case: str) -> None:
    s, language_model = Rl(steps=1, **POLICY[case]), make_model()
    batch = with_logprobs(turns(), language_model.model)
    sums = check(
        language_model,
        batch,
        TokenLoss(policy_loss, s),
        lambda model: policy_by_hand(s, sampled_logprobs(model, batch), batch),
        count=3.0,
    )
    assert sums["tokens"] == batch.num_tokens == 19
    if s.correction is None:
        assert sums["correction_masked"] == 0


def test_what_the_corrections_leave_out_is_counted(make_model: MakeModel) -> None:
    """Otherwise the cases above would test nothing: some tokens and rows are masked, not all."""
    model = make_model().model
    batch = with_logprobs(turns(), model)
    logp_N = sampled_logprobs(model, batch).detach()

    def masked(**settings: Any) -> dict[str, float]:
        sums = policy_loss(Rl(steps=1, **settings), logp_N, torch.zeros(19), batch)[1]
        return {name: float(value) for name, value in sums.items()}

    assert 0 < masked(correction=IcePop(0.95, 1.05))["correction_masked"] < 19
    assert masked(correction=IcePop(0.8, 1.1, sequence=True))["correction_masked"] in (
        4,
        5,
        9,
        10,
        14,
    )
    assert 0 < masked(correction=Truncated(1.02))["correction_truncated"] < 19
    assert masked(off_policy_delta=0.02)["off_policy_masked"] in (5, 10)
    clipped = masked(surrogate=Clip(0.1, 0.1))
    assert 0 < clipped["clip_low"] + clipped["clip_high"] < 19


class Values:
    """A critic whose values are the numbers of the tokens, a tenth each."""

    def values(self, batch: Batch) -> Tensor:
        return torch.arange(batch.num_tokens) / 10


@pytest.mark.parametrize("kl_in_reward", [False, True])
def test_advantages_of_a_critic(make_model: MakeModel, kl_in_reward: bool) -> None:
    """The next state of the last token of a turn is that of the first token of the next turn, and
    the reward arrives at the last token that was sampled."""
    gamma, lam = 0.9, 0.8
    kl = KL(0.3, where="reward", estimator="k1") if kl_in_reward else None
    batch = with_logprobs(turns(), make_model().model)
    critic: Any = Values()
    add_advantages(Rl(steps=1, advantage=Gae(lam, gamma), kl=kl), batch, critic)
    values = Values().values(batch).split(COUNTS)
    kl_N = (batch["sampler_logp_N"] - batch["ref_logp_N"]).split(COUNTS)
    found, returns = [], []
    for row, value in enumerate(values):
        following, advantages = 0.0, []
        for place in reversed(range(len(value))):
            reward = float(batch["reward_B"][row]) if place == len(value) - 1 else 0.0
            if kl_in_reward:
                reward -= 0.3 * float(batch["kl_weight_B"][row]) * float(kl_N[row][place])
            after = float(value[place + 1]) if place + 1 < len(value) else 0.0
            following = reward + gamma * after - float(value[place]) + gamma * lam * following
            advantages.insert(0, following)
        found += advantages
        returns += [a + float(v) for a, v in zip(advantages, value, strict=True)]
    assert batch["return_N"].tolist() == pytest.approx(returns, rel=1e-4)
    raw_N = torch.tensor(found)
    expected_N = (raw_N - raw_N.mean()) / (raw_N.std() + 1e-4)
    torch.testing.assert_close(batch["advantage_N"], expected_N, atol=1e-4, rtol=1e-4)


def test_a_kl_in_the_reward_is_summed_over_the_turns(make_model: MakeModel) -> None:
    """Rewards less the KL of all that the policy said; the mean of each pair of rows off."""
    kl = KL(0.3, where="reward", estimator="k1")
    batch = with_logprobs(turns(), make_model().model)
    add_advantages(Rl(steps=1, advantage="group_mean", kl=kl), batch, None)
    kl_N = batch["sampler_logp_N"] - batch["ref_logp_N"]
    rewards = [
        float(reward - 0.3 * weight * part.sum())
        for reward, weight, part in zip(
            batch["reward_B"], batch["kl_weight_B"], kl_N.split(COUNTS), strict=True
        )
    ]
    half = [(rewards[0] - rewards[1]) / 2, (rewards[2] - rewards[3]) / 2]
    expected = [half[0]] * 5 + [-half[0]] * 5 + [half[1]] * 4 + [-half[1]] * 5
    assert batch["advantage_N"].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_value_loss(make_model: MakeModel, tmp_path: Path, clip: float | None) -> None:
    """Half the squared error of the score of each state before a sampled token."""
    save(make_model(), tmp_path)
    language_model, batch = load_scalar(tmp_path), turns()
    torch.manual_seed(5)
    torch.nn.init.normal_(language_model.model.score.weight)
    batch["return_N"] = torch.linspace(-2, 2, 19)
    batch["old_value_N"] = torch.linspace(1, -1, 19)

    def by_hand(model: Any) -> Tensor:
        total = torch.zeros(())
        targets, old = (batch[name].split(COUNTS) for name in ("return_N", "old_value_N"))
        for row, row_T in enumerate(batch.tokens_BT):
            length = int(batch.length_B[row])
            hidden_TD = model.base_model(input_ids=row_T[None, :length]).last_hidden_state[0]
            value_T = model.score(hidden_TD)[:, 0].float()
            value = value_T[:-1][batch.sampled_BT[row, 1:length]]
            loss = (value - targets[row]) ** 2
            if clip is not None:
                near = old[row] + (value - old[row]).clamp(-clip, clip)
                loss = torch.maximum(loss, (near - targets[row]) ** 2)
            total = total + loss.sum() / 2
        return total

    check(language_model, batch, HeadLoss(value_loss, clip), by_hand, count=19.0)


# Demonstrations, preferences, teachers.


def test_the_cross_entropy(make_model: MakeModel) -> None:
    batch = turns()
    sums = check(
        make_model(),
        batch,
        TokenLoss(token_cross_entropy, 1.0),
        lambda model: -sampled_logprobs(model, batch).sum(),
        count=19.0,
    )
    assert sums["loss"] > 0


@pytest.mark.parametrize("loss", [Dpo(0.5), Dpo(0.5, nll_weight=0.3), DpoNorm(2.0)])
def test_the_preference_loss(make_model: MakeModel, loss: Dpo | DpoNorm) -> None:
    """Rows 0 and 1 are a pair, and rows 2 and 3; one token of each row is not read. The
    cross-entropy of the chosen responses is of all their tokens, a mean over the tokens of each."""
    batch = turns()
    batch["ref_logp_B"] = torch.tensor([-20.0, -21.0, -18.0, -25.0])
    counted_N = torch.ones(19, dtype=torch.bool)
    counted_N[[0, 7, 10, 18]] = False
    batch["counted_N"] = counted_N

    def by_hand(model: Any) -> Tensor:
        logp_N = sampled_logprobs(model, batch)
        scores = []
        for row, (logp, read) in enumerate(
            zip(logp_N.split(COUNTS), counted_N.split(COUNTS), strict=True)
        ):
            score = logp[read].sum() - batch["ref_logp_B"][row]
            scores.append(score / (COUNTS[row] - 1) if isinstance(loss, DpoNorm) else score)
        total = torch.zeros(())
        for chosen in (0, 2):
            margin = loss.beta * (scores[chosen] - scores[chosen + 1])
            total = total - torch.nn.functional.logsigmoid(margin)
            total = total - loss.nll_weight * logp_N.split(COUNTS)[chosen].mean()
        return total

    check(make_model(), batch, TokenLoss(preference_loss, loss), by_hand, count=2.0, group_rows=2)


def divergence_by_hand(how: Any, logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """By token, from the logits of student and teacher."""
    p_NV, t_NV = logits_NV.log_softmax(-1), teacher_NV.log_softmax(-1)

    def kl(a_NV: Tensor, b_NV: Tensor) -> Tensor:
        return (a_NV.exp() * (a_NV - b_NV)).sum(-1)

    if how == "reverse_kl":
        return kl(p_NV, t_NV)
    if how == "forward_kl":
        return kl(t_NV, p_NV)
    if isinstance(how, Jsd):
        mixed_NV = ((1 - how.beta) * p_NV.exp() + how.beta * t_NV.exp()).log()
        return how.beta * kl(t_NV, mixed_NV) + (1 - how.beta) * kl(p_NV, mixed_NV)
    top_NK = t_NV.topk(how.k).indices
    p_NK, t_NK = p_NV.gather(1, top_NK), t_NV.gather(1, top_NK)
    return (p_NK.exp() * (p_NK - t_NK) - p_NK.exp() + t_NK.exp()).sum(-1)


@pytest.mark.parametrize(
    "estimator", ["reverse_kl", "forward_kl", Jsd(0.3), TopK(7), SampledToken(0.4)], ids=str
)
def test_the_distillation_losses(make_model: MakeModel, estimator: Any) -> None:
    """Towards one teacher, beside a reward, rows of unequal weight, token ratios cut."""
    language_model, teacher, batch = make_model(), make_model(seed=1), turns()
    s = Distill(
        steps=1,
        routes={"d": "t"},
        estimator=estimator,
        aggregation="sequence",
        samples_per_prompt=2,
        reward_weight=0.5,
        correction=Truncated(1.02),
    )
    batch = with_logprobs(batch, language_model.model)
    batch["advantage_B"] = torch.tensor([0.5, -0.5, 0.1, -0.1])
    batch["loss_weight_B"] = torch.tensor([1.0, 2.0, 0.5, 3.0])
    batch["domain_B"] = batch["teacher_B"] = torch.zeros(4, dtype=torch.int64)
    scorer = LocalScorer(teacher, max_tokens=30)
    for name, column in teacher_columns(s, scorer, batch).items():
        batch[name] = column
    with torch.no_grad():
        teacher_NV = sampled_logits(teacher.model, batch)

    def by_hand(model: Any) -> Tensor:
        logits_NV = sampled_logits(model, batch)
        logp_N = logits_NV.log_softmax(-1).gather(1, batch.targets_N[:, None])[:, 0]
        factor_N = (logp_N - batch["sampler_logp_N"]).detach().exp().clamp(max=1.02)
        if isinstance(estimator, SampledToken):
            teacher_N = teacher_NV.log_softmax(-1).gather(1, batch.targets_N[:, None])[:, 0]
            advantage_N = (teacher_N - logp_N).detach().clamp(-0.4, 0.4)
            loss_N = -factor_N * advantage_N * logp_N
        else:
            loss_N = divergence_by_hand(estimator, logits_NV, teacher_NV)
        # The policy gradient of the reward, its ratio exactly 1.
        row_N = torch.tensor([0] * 5 + [1] * 5 + [2] * 4 + [3] * 5)
        loss_N = loss_N - 0.5 * factor_N * batch["advantage_B"][row_N] * logp_N
        total = torch.zeros(())
        for row, part in enumerate(loss_N.split(COUNTS)):
            total = total + batch["loss_weight_B"][row] * part.mean()
        return total

    loss = HeadLoss(distill_loss, LossSettings(step=s, domains=("d",), heads=(scorer.head,)))
    sums = check(language_model, batch, loss, by_hand, count=4.0)
    assert sums["tokens/d"] == 19


# Losses travel to other processes.


@pytest.mark.parametrize(
    "loss",
    [
        TokenLoss(policy_loss, Rl(steps=1, surrogate=Cispo(clip_high=4.0), kl=KL(0.1))),
        HeadLoss(value_loss, 0.2),
        HeadLoss(verdict_loss, ((3, 4), 7)),
    ],
    ids=["policy", "value", "verdict"],
)
def test_losses_can_be_pickled(loss: Loss) -> None:
    copied = pickle.loads(pickle.dumps(loss))
    assert copied == loss and copied.function is loss.function
