"""What each estimator descends, with expectations computed exactly by enumerating the vocabulary.

A softmax over 12 words, written as 12 tokens that share one hidden state (so the head is the
logits) and have the 12 words as targets. Weighting token v with p(v) makes the sum the expectation
over v.
"""

import pytest
import torch
from torch import Tensor

from posttrain.engine.errors import ConfigError
from posttrain.losses.distill import (
    full_vocabulary,
    sampled_token,
    teacher_top_k_targets,
    top_k,
)
from posttrain.losses.divergence import TeacherStates
from posttrain.losses.ops import (
    kl_estimate,
    kl_penalty,
    token_logprobs,
    unbiased_kl_penalty,
)
from posttrain.stages.config import build_config

WORDS = 12
EVERY_WORD_N = torch.arange(WORDS)
ONES_ND = torch.ones(WORDS, 1, dtype=torch.float64)


@pytest.fixture
def student_V() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(WORDS, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def teacher_V() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.log_softmax(torch.randn(WORDS, generator=generator, dtype=torch.float64), -1)


def every_logp(student_V: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each word, and the (constant) probabilities to weight them with."""
    logp_N, _ = token_logprobs(ONES_ND, student_V[:, None], EVERY_WORD_N)
    return logp_N, logp_N.detach().exp()


def reverse_kl_gradient(student_V: Tensor, teacher_V: Tensor) -> Tensor:
    logp_V = torch.log_softmax(student_V, -1)
    return torch.autograd.grad((logp_V.exp() * (logp_V - teacher_V)).sum(), student_V)[0]


def forward_kl_gradient(student_V: Tensor, teacher_V: Tensor) -> Tensor:
    logp_V = torch.log_softmax(student_V, -1)
    return torch.autograd.grad((teacher_V.exp() * (teacher_V - logp_V)).sum(), student_V)[0]


def test_the_two_directions_differ(student_V: Tensor, teacher_V: Tensor):
    """Otherwise the tests below could not tell them apart."""
    reverse_V = reverse_kl_gradient(student_V, teacher_V)
    forward_V = forward_kl_gradient(student_V, teacher_V)
    assert reverse_V.norm() > 0.1
    assert (reverse_V - forward_V).norm() > 0.3 * reverse_V.norm()


def test_sampled_token_descends_the_reverse_kl(student_V: Tensor, teacher_V: Tensor):
    logp_N, p_N = every_logp(student_V)
    loss, metrics = sampled_token(logp_N, teacher_V, p_N, advantage_clip=None)
    (grad_V,) = torch.autograd.grad(loss, student_V)
    torch.testing.assert_close(grad_V, reverse_kl_gradient(student_V, teacher_V))
    assert metrics["clipped"].item() == 0


def test_full_vocabulary_descends_the_reverse_kl(student_V: Tensor, teacher_V: Tensor):
    one_11 = ONES_ND[:1]
    teacher = TeacherStates(hidden_NE=one_11, head_VE=teacher_V[:, None])
    loss, _, _ = full_vocabulary(one_11, student_V[:, None], [teacher], ONES_ND[0])
    (grad_V,) = torch.autograd.grad(loss, student_V)
    torch.testing.assert_close(grad_V, reverse_kl_gradient(student_V, teacher_V))


def test_k1_as_a_loss_descends_nothing_and_is_refused(student_V: Tensor, teacher_V: Tensor):
    logp_N, p_N = every_logp(student_V)
    loss = (p_N * kl_estimate(logp_N, teacher_V, estimator="k1")).sum()
    (grad_V,) = torch.autograd.grad(loss, student_V)
    torch.testing.assert_close(grad_V, torch.zeros_like(grad_V), rtol=0, atol=1e-14)
    assert reverse_kl_gradient(student_V, teacher_V).norm() > 0.1
    with pytest.raises(ValueError, match="zero expected gradient"):
        kl_penalty(logp_N, teacher_V, p_N, estimator="k1")
    with pytest.raises(ConfigError, match="zero gradient in expectation"):
        build_config("distill", "student", {"steps": 1, "estimator": "k1"})


def test_k2_as_a_loss_descends_the_reverse_kl(student_V: Tensor, teacher_V: Tensor):
    logp_N, p_N = every_logp(student_V)
    loss, _ = kl_penalty(logp_N, teacher_V, p_N, estimator="k2")
    (grad_V,) = torch.autograd.grad(loss, student_V)
    torch.testing.assert_close(grad_V, reverse_kl_gradient(student_V, teacher_V))


def test_k3_as_a_loss_descends_the_forward_kl(student_V: Tensor, teacher_V: Tensor):
    logp_N, p_N = every_logp(student_V)
    loss, _ = kl_penalty(logp_N, teacher_V, p_N, estimator="k3")
    (grad_V,) = torch.autograd.grad(loss, student_V)
    torch.testing.assert_close(grad_V, forward_kl_gradient(student_V, teacher_V))


@pytest.mark.parametrize("distance", [0.0, 0.7])
def test_the_unbiased_kl_has_value_and_gradient_of_the_reverse_kl(
    student_V: Tensor, teacher_V: Tensor, distance: float
):
    """Tokens from an old policy, where k2 has another gradient; and with old == student."""
    logp_N, _ = every_logp(student_V)
    generator = torch.Generator().manual_seed(5)
    noise_V = torch.randn(len(logp_N), generator=generator, dtype=torch.float64)
    old_V = torch.log_softmax(student_V.detach() + distance * noise_V, -1)
    loss, metrics = unbiased_kl_penalty(logp_N, old_V, teacher_V, old_V.exp())
    (grad_V,) = torch.autograd.grad(loss, student_V)
    reverse_V = reverse_kl_gradient(student_V, teacher_V)
    torch.testing.assert_close(grad_V, reverse_V)
    p_V = torch.softmax(student_V.detach(), -1)
    torch.testing.assert_close(loss.detach(), (p_V * (p_V.log() - teacher_V)).sum())
    assert metrics["kl"] > 0
    if distance > 0:
        off_policy, _ = kl_penalty(every_logp(student_V)[0], teacher_V, old_V.exp(), estimator="k2")
        (off_policy_V,) = torch.autograd.grad(off_policy, student_V)
        assert (off_policy_V - reverse_V).norm() > 0.1 * reverse_V.norm()


@pytest.mark.parametrize("corrected", [True, False])
def test_top_k_needs_its_mass_correction(student_V: Tensor, teacher_V: Tensor, corrected: bool):
    """300 Adam steps on the teacher's 4 likeliest words, with and without the `- p + t` terms.

    With them (`top_k`) the student ends with the teacher's probabilities on the set. Without them
    (the formula written out below) p log(p / t) is lowest at p = t / e, so probability leaves the
    set: the student ends with less mass than the teacher and less than it started with.
    """
    logits_V = student_V.detach().clone()
    ids_NK, logp_NK = teacher_top_k_targets(ONES_ND[:1], teacher_V[:, None], 4)
    logits_V[ids_NK[0]] += 1.0
    logits_V.requires_grad_()
    teacher_mass = logp_NK.exp().sum().item()
    start_mass = torch.softmax(logits_V.detach(), -1)[ids_NK[0]].sum().item()
    optimizer = torch.optim.Adam([logits_V], lr=0.05)
    for _ in range(300):
        if corrected:
            head_VD = logits_V[:, None]
            loss, _, _ = top_k(ONES_ND[:1], head_VD, ids_NK, logp_NK, ONES_ND[0])
        else:
            p_K = torch.softmax(logits_V, -1)[ids_NK[0]]
            loss = (p_K * (p_K.log() - logp_NK[0])).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    p_K = torch.softmax(logits_V.detach(), -1)[ids_NK[0]]
    if corrected:
        torch.testing.assert_close(p_K, logp_NK[0].exp(), rtol=0, atol=1e-3)
    else:
        assert p_K.sum().item() < 0.75 * min(teacher_mass, start_mass)
        torch.testing.assert_close(p_K, logp_NK[0].exp() / torch.e, rtol=0, atol=1e-3)
