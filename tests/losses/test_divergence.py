"""The divergences over the whole vocabulary: hand-derived values, gradients, teachers, memory."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.losses.distill import full_vocabulary
from posttrain.losses.divergence import TeacherStates
from posttrain.losses.projection import HeadGradients

F64 = torch.float64
TOKENS, VOCABULARY, HIDDEN, TEACHER_HIDDEN = 9, 12, 5, 4
OPTIONS: list[dict[str, Any]] = [
    {"divergence": "reverse_kl"},
    {"divergence": "forward_kl"},
    {"divergence": "jsd", "jsd_beta": 0.5},
    {"divergence": "jsd", "jsd_beta": 0.1},
    {"divergence": "jsd", "jsd_beta": 0.8},
]


class Case:
    """A random student and teacher of different hidden sizes."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

        self.leaves = [
            normal(TOKENS, HIDDEN).requires_grad_(),
            normal(VOCABULARY, HIDDEN).requires_grad_(),
            normal(VOCABULARY).requires_grad_(),
        ]
        self.teacher = TeacherStates(
            hidden_NE=normal(TOKENS, TEACHER_HIDDEN),
            head_VE=normal(VOCABULARY, TEACHER_HIDDEN),
            bias_V=normal(VOCABULARY),
        )
        self.weight_N = torch.rand(TOKENS, generator=generator, dtype=F64) + 0.1

    def run(self, *leaves: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_ND, head_VD, bias_V = leaves or self.leaves
        loss, _, per_token = full_vocabulary(
            hidden_ND,
            head_VD,
            [self.teacher],
            self.weight_N,
            bias_V=bias_V,
            temperature=1.3,
            **options,
        )
        return loss, per_token

    def plain(self, *, divergence: str, jsd_beta: float = 0.5) -> Tensor:
        """The definition, differentiated by autograd."""
        hidden_ND, head_VD, bias_V = self.leaves
        logp_NV = torch.log_softmax((hidden_ND @ head_VD.T + bias_V) / 1.3, -1)
        teacher = self.teacher
        teacher_NV = teacher.hidden_NE @ teacher.head_VE.T + teacher.bias_V
        logt_NV = torch.log_softmax(teacher_NV / 1.3, -1)
        p_NV, t_NV = logp_NV.exp(), logt_NV.exp()
        if divergence == "reverse_kl":
            loss_NV = p_NV * (logp_NV - logt_NV)
        elif divergence == "forward_kl":
            loss_NV = t_NV * (logt_NV - logp_NV)
        else:
            logm_NV = torch.log((1 - jsd_beta) * p_NV + jsd_beta * t_NV)
            student_NV = (1 - jsd_beta) * p_NV * (logp_NV - logm_NV)
            loss_NV = jsd_beta * t_NV * (logt_NV - logm_NV) + student_NV
        return (self.weight_N * loss_NV.sum(-1)).sum()


def one_token(
    student_V: Tensor, teacher_V: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """One token of weight 2 with hidden state 1, so that the heads are the logits."""
    one_11 = torch.ones(1, 1, dtype=student_V.dtype)
    weight_N = torch.tensor([2.0], dtype=student_V.dtype)
    teacher = TeacherStates(hidden_NE=one_11, head_VE=teacher_V[:, None])
    loss, _, per_token = full_vocabulary(one_11, student_V[:, None], [teacher], weight_N, **options)
    return loss, per_token


def test_forward_kl_by_hand():
    """p = (1/2, 1/2), t = (3/4, 1/4): KL(t || p) = 3/4 log(3/2) + 1/4 log(1/2), gradient p - t.

    The logged KL stays the reverse one, 1/2 log(4/3).
    """
    student_V = torch.zeros(2, dtype=F64, requires_grad=True)
    teacher_V = torch.tensor([math.log(3), 0.0], dtype=F64)
    loss, per_token = one_token(student_V, teacher_V, divergence="forward_kl")
    assert loss.item() == pytest.approx(2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    assert per_token["kl"].item() == pytest.approx(0.5 * math.log(4 / 3))
    assert per_token["entropy"].item() == pytest.approx(math.log(2))
    (grad_V,) = torch.autograd.grad(loss, student_V)
    assert grad_V.tolist() == pytest.approx([-0.5, 0.5])


def test_jsd_by_hand():
    """p = (1/2, 1/2), t = (3/4, 1/4), beta = 1/3: m = 2/3 p + 1/3 t = (7/12, 5/12).

    KL(t || m) = 3/4 log(9/7) + 1/4 log(3/5), KL(p || m) = 1/2 log(36/35). The gradient is
    2/3 p_v (log(p_v / m_v) - KL(p || m)): 1/3 (log(6/7) - 1/2 log(36/35)) = 1/6 log(5/7) at 0.
    """
    student_V = torch.zeros(2, dtype=F64, requires_grad=True)
    teacher_V = torch.tensor([math.log(3), 0.0], dtype=F64)
    loss, per_token = one_token(student_V, teacher_V, divergence="jsd", jsd_beta=1 / 3)
    of_teacher = 0.75 * math.log(9 / 7) + 0.25 * math.log(3 / 5)
    of_student = 0.5 * math.log(36 / 35)
    assert loss.item() == pytest.approx(2 * (of_teacher / 3 + 2 * of_student / 3))
    assert per_token["kl"].item() == pytest.approx(0.5 * math.log(4 / 3))
    (grad_V,) = torch.autograd.grad(loss, student_V)
    assert grad_V.tolist() == pytest.approx([math.log(5 / 7) / 3, -math.log(5 / 7) / 3])


def test_which_end_of_beta_is_which():
    """JSD / beta tends to the forward KL, JSD / (1 - beta) to the reverse KL."""
    case = Case()
    for beta, scale, end in ((1e-6, 1e-6, "forward_kl"), (1 - 1e-6, 1e-6, "reverse_kl")):
        loss = case.run(divergence="jsd", jsd_beta=beta)[0] / scale
        assert loss.item() == pytest.approx(case.run(divergence=end)[0].item(), rel=1e-4)
    forward, reverse = (
        case.run(divergence=name)[0].item() for name in ("forward_kl", "reverse_kl")
    )
    assert forward != pytest.approx(reverse, rel=0.05)


def test_the_symmetric_jsd_is_symmetric():
    student_V, teacher_V = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    for beta in (0.5, 0.3):
        one, _ = one_token(student_V, teacher_V, divergence="jsd", jsd_beta=beta)
        other, _ = one_token(teacher_V, student_V, divergence="jsd", jsd_beta=1 - beta)
        assert one.item() == pytest.approx(other.item(), rel=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("max_elements", [2**22, 4 * VOCABULARY, 1])
def test_equals_plain_autograd(options: dict[str, Any], max_elements: int):
    case = Case()
    loss, per_token = case.run(**options, max_elements=max_elements)
    plain = case.plain(**options)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, case.leaves),
        torch.autograd.grad(plain, case.leaves),
        rtol=1e-11,
        atol=1e-12,
    )
    _, reverse = case.run(divergence="reverse_kl")
    torch.testing.assert_close(per_token, reverse)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict[str, Any]):
    """Also of a graph that is walked twice: gradcheck retains it."""
    case = Case()
    assert torch.autograd.gradcheck(lambda *leaves: case.run(*leaves, **options)[0], case.leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_identical_teacher_gives_exactly_zero(options: dict[str, Any], dtype: torch.dtype):
    hidden_ND, head_VD, _ = Case(dtype).leaves
    same = TeacherStates(hidden_NE=hidden_ND.detach(), head_VE=head_VD.detach())
    loss, _, _ = full_vocabulary(hidden_ND, head_VD, [same], torch.ones(TOKENS), **options)
    assert loss.item() == 0
    grads = torch.autograd.grad(loss, (hidden_ND, head_VD))
    assert all(grad.abs().max().item() == 0 for grad in grads)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_constant_added_to_all_logits_changes_nothing(options: dict[str, Any]):
    case = Case()
    loss, _ = case.run(**options)
    assert case.teacher.bias_V is not None
    case.teacher = replace(case.teacher, bias_V=case.teacher.bias_V - 40)
    hidden_ND, head_VD, bias_V = case.leaves
    moved, _ = case.run(hidden_ND, head_VD, bias_V + 70, **options)
    torch.testing.assert_close(moved, loss, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_jsd_of_models_that_exclude_each_other(beta: float, dtype: torch.dtype):
    """p = (1, 0) and t = (0, 1) up to e^-300: the JSD is the entropy of (beta, 1 - beta)."""
    student_V = torch.tensor([300.0, 0.0], dtype=dtype, requires_grad=True)
    loss, _ = one_token(student_V, -student_V.detach(), divergence="jsd", jsd_beta=beta)
    expected = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert loss.item() == pytest.approx(2 * expected, rel=1e-5)
    (grad_V,) = torch.autograd.grad(loss, student_V)
    assert grad_V.abs().max().item() < 1e-6


@pytest.mark.parametrize("options", OPTIONS)
def test_bfloat16_states_keep_float32_losses(options: dict[str, Any]):
    """Against float64 of the same rounded numbers only the logits' rounding is lost."""
    low, high = Case(torch.bfloat16), Case()
    high.leaves = [leaf.detach().double().requires_grad_() for leaf in low.leaves]
    assert low.teacher.bias_V is not None
    high.teacher = TeacherStates(
        hidden_NE=low.teacher.hidden_NE.double(),
        head_VE=low.teacher.head_VE.double(),
        bias_V=low.teacher.bias_V.double(),
    )
    loss, per_token = low.run(**options)
    exact, _ = high.run(**options)
    assert per_token["kl"].dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    grads = torch.autograd.grad(loss, low.leaves)
    exact_grads = torch.autograd.grad(exact, high.leaves)
    for rough, fine in zip(grads, exact_grads, strict=True):
        assert rough.dtype == torch.bfloat16
        assert ((rough.double() - fine).norm() / fine.norm()).item() < 0.03


def test_teacher_states_may_be_narrower_than_their_head():
    """bfloat16 states beside a float32 head are the widened states: no product is in bfloat16."""
    case = Case(torch.float32)
    exact, _ = case.run()
    case.teacher = replace(case.teacher, hidden_NE=case.teacher.hidden_NE.bfloat16())
    narrow, _ = case.run()
    case.teacher = replace(case.teacher, hidden_NE=case.teacher.hidden_NE.float())
    widened, _ = case.run()
    assert narrow.item() == widened.item() != exact.item()
    assert narrow.item() == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_teacher_may_be_wider_than_the_student(options: dict[str, Any]):
    case = Case(torch.float32)
    exact, _ = case.run(**options)
    wide = {n: getattr(case.teacher, n).double() for n in ("hidden_NE", "head_VE", "bias_V")}
    case.teacher = replace(case.teacher, **wide)
    found, _ = case.run(**options)
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("max_elements", [2**22, 4 * VOCABULARY, 1])
def test_teachers_of_many_are_each_their_own(options: dict[str, Any], max_elements: int):
    """Four teachers, one of them without tokens, against one call for each."""
    generator = torch.Generator().manual_seed(3)
    case = Case()
    hidden_ND, head_VD, bias_V = case.leaves
    teachers = [
        TeacherStates(
            hidden_NE=torch.randn(count, size, generator=generator, dtype=F64),
            head_VE=torch.randn(VOCABULARY, size, generator=generator, dtype=F64),
            bias_V=torch.randn(VOCABULARY, generator=generator, dtype=F64) if size == 3 else None,
        )
        for count, size in ((2, 3), (0, 6), (6, 5), (1, 3))
    ]
    together, metrics, per_token = full_vocabulary(
        hidden_ND,
        head_VD,
        teachers,
        case.weight_N,
        bias_V=bias_V,
        temperature=0.9,
        max_elements=max_elements,
        **options,
    )
    alone, first = hidden_ND.new_zeros(()), 0
    for teacher in teachers:
        rows = slice(first, first + len(teacher.hidden_NE))
        first = rows.stop
        loss, _, tokens = full_vocabulary(
            hidden_ND[rows],
            head_VD,
            [teacher],
            case.weight_N[rows],
            bias_V=bias_V,
            temperature=0.9,
            **options,
        )
        alone = alone + loss
        for name, value_N in tokens.items():
            torch.testing.assert_close(per_token[name][rows], value_N, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["kl"], per_token["kl"].sum())
    torch.testing.assert_close(
        torch.autograd.grad(together, case.leaves),
        torch.autograd.grad(alone, case.leaves),
        rtol=1e-11,
        atol=1e-12,
    )


def test_every_token_has_one_teacher():
    case = Case()
    hidden_ND, head_VD, _ = case.leaves
    short = replace(case.teacher, hidden_NE=case.teacher.hidden_NE[:7])
    with pytest.raises(ValueError, match="7 hidden states together, the student has 9"):
        full_vocabulary(hidden_ND, head_VD, [short], case.weight_N)


def test_refused_settings():
    with pytest.raises(ValueError, match="'kl' is not one of reverse_kl, forward_kl, jsd"):
        Case().run(divergence="kl")
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"jsd_beta: {beta} must be above 0 and below 1"):
            Case().run(divergence="jsd", jsd_beta=beta)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the head gradients that the forward passes compute lie in memory."""
    addresses: list[int] = []
    result = HeadGradients.result

    def recorded(sums: HeadGradients) -> Any:
        gradients = result(sums)
        addresses.append(gradients[1].data_ptr() if gradients[1] is not None else 0)
        return gradients

    monkeypatch.setattr(HeadGradients, "result", recorded)
    return addresses


def test_the_head_gradient_exists_once(computed: list[int]):
    """What the forward pass summed becomes `.grad` itself, though the caller divides."""
    case = Case(torch.float32)
    (case.run(max_elements=2 * VOCABULARY)[0] / 7).backward()
    assert case.leaves[1].grad is not None
    assert computed == [case.leaves[1].grad.data_ptr()]


def test_the_gradient_of_a_tied_head_is_added_in_place(computed: list[int]):
    """The head is the embedding too: its other gradient is added to the one that is there."""
    generator = torch.Generator().manual_seed(0)
    tied_VD = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    case = Case(torch.float32)
    hidden_ND = torch.nn.functional.embedding(torch.arange(TOKENS), tied_VD).tanh()
    (case.run(hidden_ND, tied_VD, case.leaves[2])[0] / 7).backward()
    assert tied_VD.grad is not None
    assert computed == [tied_VD.grad.data_ptr()]


def test_a_retained_graph_gives_the_same_gradients_again():
    case = Case()
    loss, _ = case.run(divergence="jsd")
    first = torch.autograd.grad(loss / 3, case.leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    again = torch.autograd.grad(loss, case.leaves)
    torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)
    torch.testing.assert_close([grad / 3 for grad in again], kept)


def test_second_derivatives_are_refused():
    case = Case()
    (grad_ND,) = torch.autograd.grad(case.run()[0], case.leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad_ND.sum().backward()
