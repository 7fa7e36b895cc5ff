"""On-policy distillation of tabular students that must reach their teachers exactly.

A bigram model is a `[V, V]` table: the hidden state is the one-hot previous word, so `head_VD`
holds the logits of the next word in the column of the previous one. The student samples its own
words, each estimator scores them, and the exact KL over all states says whether it arrived.
"""

import pytest
import torch
from torch import Tensor

from posttrain.losses.distill import (
    full_vocabulary,
    sampled_token,
    teacher_top_k_targets,
    top_k,
)
from posttrain.losses.divergence import TeacherStates
from posttrain.losses.ops import token_logprobs

WORDS, ROWS, LENGTH = 6, 64, 8
ARRIVED = {"sampled_token": 1e-5, "top_k": 1e-2, "full_vocabulary": 1e-5}
"""Largest final KL. Only the total mass holds the word outside the top k, which is slow."""


def make_teacher(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WORDS, WORDS, generator=generator)


def sample(head_VD: Tensor, domain: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The states and the words of `ROWS` responses, flat; the first word is the prompt."""
    word_B = torch.arange(ROWS) % WORDS
    states, words = [], []
    for _ in range(LENGTH):
        state_B = word_B + domain * WORDS
        p_BV = torch.softmax(head_VD.detach()[:, state_B].T, -1)
        word_B = torch.multinomial(p_BV, 1, generator=generator)[:, 0]
        states.append(state_B)
        words.append(word_B)
    return torch.cat(states), torch.cat(words)


def distillation_loss(
    estimator: str, head_VD: Tensor, teacher_VE: Tensor, state_N: Tensor, word_N: Tensor
) -> Tensor:
    hidden_ND = torch.nn.functional.one_hot(state_N, head_VD.shape[1]).float()
    teacher_hidden_NE = torch.nn.functional.one_hot(state_N % WORDS, WORDS).float()
    weight_N = torch.ones(len(state_N))
    if estimator == "full_vocabulary":
        teacher = TeacherStates(hidden_NE=teacher_hidden_NE, head_VE=teacher_VE)
        return full_vocabulary(hidden_ND, head_VD, [teacher], weight_N)[0]
    if estimator == "top_k":
        # All words but one: the last one's probability follows from the mass on the set.
        ids_NK, logp_NK = teacher_top_k_targets(teacher_hidden_NE, teacher_VE, WORDS - 1)
        return top_k(hidden_ND, head_VD, ids_NK, logp_NK, weight_N)[0]
    logp_N, _ = token_logprobs(hidden_ND, head_VD, word_N)
    teacher_logp_N, _ = token_logprobs(teacher_hidden_NE, teacher_VE, word_N)
    return sampled_token(logp_N, teacher_logp_N, weight_N, advantage_clip=5.0)[0]


def distill(estimator: str, teachers: list[Tensor], steps: int = 300) -> Tensor:
    """Train one student on all domains at once, each scored by its own teacher."""
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.zeros(WORDS, WORDS * len(teachers), requires_grad=True)
    optimizer = torch.optim.Adam([head_VD], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        loss = torch.zeros(())
        for domain, teacher_VE in enumerate(teachers):
            state_N, word_N = sample(head_VD, domain, generator)
            loss = loss + distillation_loss(estimator, head_VD, teacher_VE, state_N, word_N)
        optimizer.zero_grad()
        (loss / (len(teachers) * ROWS * LENGTH)).backward()
        optimizer.step()
        schedule.step()
    return head_VD.detach()


def exact_kl(student_VD: Tensor, teacher_VD: Tensor) -> float:
    """KL(student || teacher) of the next word, mean over all states."""
    logp_DV = torch.log_softmax(student_VD.T, -1)
    return (logp_DV.exp() * (logp_DV - torch.log_softmax(teacher_VD.T, -1))).sum(-1).mean().item()


@pytest.mark.parametrize("estimator", ARRIVED)
def test_student_reaches_its_teacher(estimator: str):
    teacher_VE = make_teacher(1)
    assert exact_kl(torch.zeros(WORDS, WORDS), teacher_VE) > 0.3
    student_VD = distill(estimator, [teacher_VE])
    assert exact_kl(student_VD, teacher_VE) < ARRIVED[estimator]


@pytest.mark.parametrize("estimator", ARRIVED)
def test_student_reaches_each_teacher_on_its_own_prompts(estimator: str):
    """States are doubled by domain; the teachers disagree, so a wrong routing cannot pass."""
    first_VE, second_VE = make_teacher(1), make_teacher(2)
    assert exact_kl(first_VE, second_VE) > 0.5 and exact_kl(second_VE, first_VE) > 0.5
    student_VD = distill(estimator, [first_VE, second_VE])
    assert exact_kl(student_VD[:, :WORDS], first_VE) < ARRIVED[estimator]
    assert exact_kl(student_VD[:, WORDS:], second_VE) < ARRIVED[estimator]
