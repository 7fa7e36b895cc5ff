"""The distillation losses: hand-derived values, gradients, chunks, invariances."""

import math

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

F64 = torch.float64
TOKENS, VOCABULARY, HIDDEN, TEACHER_HIDDEN = 9, 12, 5, 4


class Case:
    """A random student and teacher of different hidden sizes, all float64."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.hidden_ND = normal(TOKENS, HIDDEN).requires_grad_()
        self.head_VD = normal(VOCABULARY, HIDDEN).requires_grad_()
        self.bias_V = normal(VOCABULARY).requires_grad_()
        self.teacher_hidden_NE = normal(TOKENS, TEACHER_HIDDEN)
        self.teacher_head_VE = normal(VOCABULARY, TEACHER_HIDDEN)
        self.teacher_bias_V = normal(VOCABULARY)
        self.weight_N = torch.rand(TOKENS, generator=generator, dtype=F64) + 0.1
        self.leaves = (self.hidden_ND, self.head_VD, self.bias_V)

    def full(self, index: Tensor | slice = slice(None), **options):
        return full_vocabulary(
            self.hidden_ND[index],
            self.head_VD,
            [self.teacher(index)],
            self.weight_N[index],
            bias_V=self.bias_V,
            temperature=1.3,
            **options,
        )

    def teacher(self, index: Tensor | slice = slice(None)) -> TeacherStates:
        return TeacherStates(
            hidden_NE=self.teacher_hidden_NE[index],
            head_VE=self.teacher_head_VE,
            bias_V=self.teacher_bias_V,
        )

    def top(self, index: Tensor | slice = slice(None), k: int = 4, **options):
        ids_NK, logp_NK = teacher_top_k_targets(
            self.teacher_hidden_NE,
            self.teacher_head_VE,
            k,
            bias_V=self.teacher_bias_V,
            temperature=1.3,
            **options,
        )
        return top_k(
            self.hidden_ND[index],
            self.head_VD,
            ids_NK[index],
            logp_NK[index],
            self.weight_N[index],
            bias_V=self.bias_V,
            temperature=1.3,
            **options,
        )

    def log_softmaxes(self) -> tuple[Tensor, Tensor]:
        student_NV = self.hidden_ND @ self.head_VD.T + self.bias_V
        teacher_NV = self.teacher_hidden_NE @ self.teacher_head_VE.T + self.teacher_bias_V
        return torch.log_softmax(student_NV / 1.3, -1), torch.log_softmax(teacher_NV / 1.3, -1)


def from_logits(student_V: Tensor, teacher_V: Tensor) -> tuple[Tensor, Tensor, list[TeacherStates]]:
    """One token with hidden state 1, so that the heads are the logits."""
    one_11 = torch.ones(1, 1, dtype=F64)
    teacher = TeacherStates(hidden_NE=one_11, head_VE=teacher_V[:, None])
    return one_11, student_V[:, None], [teacher]


# --- sampled_token ------------------------------------------------------------------------------


def test_sampled_token_by_hand():
    """Student p = 1/2 and e^-9, teacher 1/4 and e^-2: log ratios -log 2 and 7, clipped at 5.

    Weights 1 and 3, corrections 1 and 1/2: A = -log 2 and 5 / 2 = 2.5; the gradient with respect
    to logp is -weight * A.
    """
    logp_N = torch.tensor([math.log(0.5), -9.0], dtype=F64).requires_grad_()
    loss, metrics = sampled_token(
        logp_N,
        torch.tensor([math.log(0.25), -2.0], dtype=F64),
        torch.tensor([1.0, 3.0], dtype=F64),
        advantage_clip=5.0,
        correction_N=torch.tensor([1.0, 0.5], dtype=F64),
    )
    d = math.log(2)
    assert loss.item() == pytest.approx(d * -d - 3 * 2.5 * -9)
    loss.backward()
    assert logp_N.grad is not None
    assert logp_N.grad.tolist() == pytest.approx([d, -7.5])
    values = {name: metric.item() for name, metric in metrics.items()}
    expected = {
        "advantage": 7 - d,
        "advantage_abs": 7 + d,
        "advantage_square": 49 + d * d,
        "clipped": 1.0,
    }
    assert values == pytest.approx(expected)


def test_sampled_token_clips_both_sides_only_when_asked():
    logp_N = torch.tensor([-9.0, -1.0], dtype=F64).requires_grad_()
    teacher_N = torch.tensor([-1.0, -9.0], dtype=F64)
    for clip, grads in ((5.0, [-5.0, 5.0]), (None, [-8.0, 8.0])):
        loss, metrics = sampled_token(
            logp_N, teacher_N, torch.ones(2, dtype=F64), advantage_clip=clip
        )
        assert torch.autograd.grad(loss, logp_N)[0].tolist() == grads
        assert metrics["clipped"].item() == (2 if clip else 0)
    with pytest.raises(ValueError, match="advantage_clip: 0"):
        sampled_token(logp_N, teacher_N, torch.ones(2), advantage_clip=0.0)


def test_sampled_token_of_an_identical_teacher_is_zero():
    logp_N = torch.tensor([-1.0, -2.0], dtype=F64).requires_grad_()
    loss, metrics = sampled_token(logp_N, logp_N.detach(), torch.ones(2), advantage_clip=None)
    assert loss.item() == 0 and torch.autograd.grad(loss, logp_N)[0].tolist() == [0, 0]
    assert metrics["advantage_abs"].item() == 0


def test_sampled_token_padding_order_and_parts():
    generator = torch.Generator().manual_seed(0)
    logp_N, teacher_N = -torch.rand(2, 10, generator=generator, dtype=F64) * 6
    weight_N, correction_N = torch.rand(2, 10, generator=generator, dtype=F64) + 0.1

    def run(logp_N, teacher_N, weight_N, correction_N):
        return sampled_token(
            logp_N,
            teacher_N,
            weight_N,
            advantage_clip=1.5,
            correction_N=correction_N,
        )

    columns = (logp_N, teacher_N, weight_N, correction_N)
    loss, metrics = run(*columns)
    assert 0 < metrics["clipped"].item() < 10
    order = torch.randperm(12, generator=generator)
    garbage = [(-math.inf, math.nan), (-70.0, -math.inf), (0.0, 0.0), (7.0, 0.0)]
    padded = [
        torch.cat([column, torch.tensor(extra, dtype=F64)])[order]
        for column, extra in zip(columns, garbage, strict=True)
    ]
    again, again_metrics = run(*padded)
    parts = [run(*(column[part] for column in columns)) for part in (slice(0, 4), slice(4, 10))]
    torch.testing.assert_close(again, loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss, rtol=1e-13, atol=1e-13)
    for name, value in metrics.items():
        torch.testing.assert_close(again_metrics[name], value, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)


# --- full_vocabulary and top_k ------------------------------------------------------------------


def test_full_vocabulary_by_hand():
    """p = (1/2, 1/2), t = (3/4, 1/4): KL = 1/2 log(2/3) + 1/2 log 2 = 1/2 log(4/3), entropy log 2.

    Gradient with respect to logit v: p_v (log(p_v / t_v) - KL) = (-1/4, +1/4) * log 3. Weight 2.
    """
    student_V = torch.zeros(2, dtype=F64, requires_grad=True)
    teacher_V = torch.tensor([math.log(3), 0.0], dtype=F64)
    weight_N = torch.tensor([2.0], dtype=F64)
    loss, metrics, per_token = full_vocabulary(*from_logits(student_V, teacher_V), weight_N)
    kl = 0.5 * math.log(4 / 3)
    assert loss.item() == pytest.approx(2 * kl)
    assert metrics["kl"].item() == per_token["kl"].item() == pytest.approx(kl)
    assert metrics["entropy"].item() == per_token["entropy"].item() == pytest.approx(math.log(2))
    (grad_V,) = torch.autograd.grad(loss, student_V)
    assert grad_V.tolist() == pytest.approx([-0.5 * math.log(3), 0.5 * math.log(3)])


def test_top_k_by_hand():
    """p = (1/4, 1/4, 1/2), t = (1/2, 1/4, 1/4), k = 1: the set is {0}.

    Loss = 1/4 log(1/2) - 1/4 + 1/2 = 1/4 - 1/4 log 2. With a_0 = -log 2 the gradient is
    p_v (a_v - p_0 a_0) = log 2 * (-1/4 + 1/16, 1/16, 1/8). Weight 2.
    """
    student_V = torch.tensor([0.25, 0.25, 0.5], dtype=F64).log().requires_grad_()
    teacher_V = torch.tensor([0.5, 0.25, 0.25], dtype=F64).log()
    hidden_ND, head_VD, (teacher,) = from_logits(student_V, teacher_V)
    ids_NK, logp_NK = teacher_top_k_targets(teacher.hidden_NE, teacher.head_VE, 1)
    assert ids_NK.tolist() == [[0]] and logp_NK.item() == pytest.approx(math.log(0.5))
    loss, metrics, per_token = top_k(
        hidden_ND,
        head_VD,
        ids_NK,
        logp_NK,
        torch.tensor([2.0], dtype=F64),
    )
    d = math.log(2)
    assert loss.item() == pytest.approx(2 * (0.25 - 0.25 * d))
    assert per_token["kl"].item() == metrics["kl"].item() == pytest.approx(0.25 - 0.25 * d)
    assert metrics["student_mass"].item() == pytest.approx(0.25)
    assert metrics["teacher_mass"].item() == pytest.approx(0.5)
    assert metrics["entropy"].item() == pytest.approx(1.5 * d)
    (grad_V,) = torch.autograd.grad(loss, student_V)
    assert grad_V.tolist() == pytest.approx([-0.375 * d, 0.125 * d, 0.25 * d])


def test_teacher_targets_are_of_the_whole_softmax():
    case = Case()
    _, teacher_NV = case.log_softmaxes()
    ids_NK, logp_NK = teacher_top_k_targets(
        case.teacher_hidden_NE,
        case.teacher_head_VE,
        3,
        bias_V=case.teacher_bias_V,
        temperature=1.3,
        max_elements=2 * VOCABULARY,
    )
    torch.testing.assert_close(logp_NK, teacher_NV.gather(1, ids_NK))
    outside_NV = teacher_NV.scatter(1, ids_NK, -math.inf)
    assert (outside_NV.amax(-1) <= logp_NK[:, -1]).all()
    assert (logp_NK.diff(dim=1) <= 0).all()
    assert logp_NK.exp().sum(-1).max() < 1
    for k in (0, VOCABULARY + 1):
        with pytest.raises(ValueError, match=rf"k: {k} must be between 1 and .* 12"):
            teacher_top_k_targets(case.teacher_hidden_NE, case.teacher_head_VE, k)


@pytest.mark.parametrize("estimator", ["full", "top"])
@pytest.mark.parametrize("max_elements", [2**22, 4 * VOCABULARY, 1])
def test_gradcheck_when_the_caller_divides(estimator: str, max_elements: int):
    case = Case()

    def loss(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor) -> Tensor:
        case.hidden_ND, case.head_VD, case.bias_V = hidden_ND, head_VD, bias_V
        return getattr(case, estimator)(max_elements=max_elements)[0] / 3

    assert torch.autograd.gradcheck(loss, case.leaves)


@pytest.mark.parametrize("max_elements", [2**22, 4 * VOCABULARY, 1])
def test_full_vocabulary_equals_plain_autograd(max_elements: int):
    case = Case()
    loss, metrics, per_token = case.full(max_elements=max_elements)
    student_NV, teacher_NV = case.log_softmaxes()
    kl_N = (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
    naive = (case.weight_N * kl_N).sum()
    torch.testing.assert_close(loss, naive, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(per_token["kl"], kl_N.detach(), rtol=1e-12, atol=1e-12)
    entropy_N = -(student_NV.exp() * student_NV).sum(-1).detach()
    torch.testing.assert_close(per_token["entropy"], entropy_N)
    torch.testing.assert_close(metrics["kl"], kl_N.sum().detach())
    grads = torch.autograd.grad(loss, case.leaves)
    naive_grads = torch.autograd.grad(naive, case.leaves)
    torch.testing.assert_close(grads, naive_grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("max_elements", [2**22, 4 * VOCABULARY, 1])
def test_top_k_equals_plain_autograd(max_elements: int):
    case = Case()
    loss, metrics, per_token = case.top(max_elements=max_elements)
    student_NV, teacher_NV = case.log_softmaxes()
    top_NK = teacher_NV.topk(4, -1)
    p_NK = student_NV.gather(1, top_NK.indices).exp()
    kl_N = (p_NK * (p_NK.log() - top_NK.values) - p_NK + top_NK.values.exp()).sum(-1)
    naive = (case.weight_N * kl_N).sum()
    torch.testing.assert_close(loss, naive, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(per_token["kl"], kl_N.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["student_mass"], p_NK.sum().detach())
    torch.testing.assert_close(metrics["teacher_mass"], top_NK.values.exp().sum())
    grads = torch.autograd.grad(loss, case.leaves)
    naive_grads = torch.autograd.grad(naive, case.leaves)
    torch.testing.assert_close(grads, naive_grads, rtol=1e-11, atol=1e-12)


def test_top_k_of_the_whole_vocabulary_is_full_vocabulary():
    case = Case()
    full_loss, full_metrics, full_tokens = case.full()
    top_loss, top_metrics, top_tokens = case.top(k=VOCABULARY)
    torch.testing.assert_close(top_loss, full_loss, rtol=1e-12, atol=1e-12)
    for name in ("kl", "entropy"):
        torch.testing.assert_close(top_metrics[name], full_metrics[name])
        torch.testing.assert_close(top_tokens[name], full_tokens[name])
    assert top_metrics["student_mass"].item() == pytest.approx(TOKENS)
    torch.testing.assert_close(
        torch.autograd.grad(top_loss, case.leaves),
        torch.autograd.grad(full_loss, case.leaves),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["full", "top"])
def test_identical_teacher_gives_exactly_zero(estimator: str, dtype: torch.dtype):
    """Not nearly: both models take the same path, so loss and gradient are 0 bit for bit."""
    generator = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    head_VD = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight_N = torch.ones(TOKENS)
    if estimator == "full":
        same = TeacherStates(hidden_NE=hidden_ND, head_VE=head_VD)
        loss, _, _ = full_vocabulary(hidden_ND, head_VD, [same], weight_N)
    else:
        ids_NK, logp_NK = teacher_top_k_targets(hidden_ND, head_VD, 4)
        loss, _, _ = top_k(hidden_ND, head_VD, ids_NK, logp_NK, weight_N)
    assert loss.item() == 0
    grads = torch.autograd.grad(loss, (hidden_ND, head_VD))
    assert all(grad.abs().max().item() == 0 for grad in grads)


@pytest.mark.parametrize("estimator", ["full", "top"])
def test_padding_order_and_parts(estimator: str):
    case = Case()
    loss, metrics, _ = getattr(case, estimator)()
    grads = torch.autograd.grad(loss, case.leaves)

    run = getattr(case, estimator)
    parts = [run(slice(0, 4)), run(slice(4, TOKENS))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss, rtol=1e-13, atol=1e-13)
    part_grads = torch.autograd.grad(parts[0][0] + parts[1][0], case.leaves)
    torch.testing.assert_close(part_grads, grads, rtol=1e-12, atol=1e-12)
    for name, value in metrics.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)

    order_N = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    shuffled, shuffled_metrics, shuffled_tokens = run(order_N)
    torch.testing.assert_close(shuffled, loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(shuffled_tokens["kl"], run()[2]["kl"][order_N])
    for name, value in metrics.items():
        torch.testing.assert_close(shuffled_metrics[name], value)

    case.weight_N = torch.cat([case.weight_N, torch.zeros(TOKENS)])
    for name in ("hidden_ND", "teacher_hidden_NE"):
        tensor = getattr(case, name)
        setattr(case, name, torch.cat([tensor, 50 * tensor.detach().flip(0)]))
    padded, padded_metrics, padded_tokens = run()
    assert padded_tokens["kl"].shape == (2 * TOKENS,)
    torch.testing.assert_close(padded, loss, rtol=1e-13, atol=1e-13)
    padded_grads = torch.autograd.grad(padded, case.leaves)
    torch.testing.assert_close(padded_grads, grads, rtol=1e-12, atol=1e-12)
    for name, value in metrics.items():
        torch.testing.assert_close(padded_metrics[name], value)


@pytest.mark.parametrize("estimator", ["full", "top"])
def test_gradients_only_for_what_needs_them(estimator: str):
    case = Case()
    case.head_VD.requires_grad_(False)
    case.teacher_hidden_NE.requires_grad_()
    case.teacher_head_VE.requires_grad_()
    loss, metrics, per_token = getattr(case, estimator)()
    loss.backward()
    assert case.hidden_ND.grad is not None and case.bias_V.grad is not None
    assert case.head_VD.grad is None
    assert case.teacher_hidden_NE.grad is None and case.teacher_head_VE.grad is None
    assert not any(value.requires_grad for value in (*metrics.values(), *per_token.values()))
    with torch.no_grad():
        silent, _, silent_tokens = getattr(case, estimator)()
    assert not silent.requires_grad
    torch.testing.assert_close(silent, loss.detach())
    torch.testing.assert_close(silent_tokens, per_token)


def test_bfloat16_states_keep_float32_losses():
    """Against float64 of the same rounded numbers only the logits' rounding is lost."""
    case = Case()
    rounded = {
        name: getattr(case, name).detach().bfloat16()
        for name in ("hidden_ND", "head_VD", "teacher_hidden_NE", "teacher_head_VE")
    }
    low = [tensor.clone().requires_grad_() for tensor in rounded.values()]
    high = [tensor.double().requires_grad_() for tensor in rounded.values()]

    def run(hidden_ND, head_VD, teacher_hidden_NE, teacher_head_VE):
        teacher = TeacherStates(hidden_NE=teacher_hidden_NE, head_VE=teacher_head_VE)
        return full_vocabulary(hidden_ND, head_VD, [teacher], case.weight_N)

    loss, _, per_token = run(*low)
    exact, _, exact_tokens = run(*high)
    assert loss.dtype == torch.float64 and per_token["kl"].dtype == torch.float32
    torch.testing.assert_close(per_token["kl"].double(), exact_tokens["kl"], rtol=0.03, atol=0.03)
    loss.backward()
    exact.backward()
    for rough, fine in zip(low[:2], high[:2], strict=True):
        assert rough.grad is not None and rough.grad.dtype == torch.bfloat16
        assert fine.grad is not None
        error = (rough.grad.double() - fine.grad).norm() / fine.grad.norm()
        assert error.item() < 0.03


def test_vocabularies_must_agree():
    case = Case()
    other = TeacherStates(
        hidden_NE=case.teacher_hidden_NE, head_VE=case.teacher_head_VE[:11], bias_V=None
    )
    with pytest.raises(ValueError, match=r"head_V \(12,\), teacher_head_V \(11,\)"):
        full_vocabulary(case.hidden_ND, case.head_VD, [other], case.weight_N)
    with pytest.raises(ValueError, match=r"weight_N \(3,\)"):
        full_vocabulary(case.hidden_ND, case.head_VD, [case.teacher()], case.weight_N[:3])
