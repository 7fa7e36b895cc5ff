"""Losses over a head in bfloat16: as near to float32 as bfloat16 is, whatever the chunks.

Legend: N tokens, D hidden size, V vocabulary, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.losses import ops, projection
from posttrain.losses.distill import full_vocabulary, teacher_top_k_targets, top_k
from posttrain.losses.divergence import Divergence, TeacherStates
from posttrain.losses.ops import token_logprobs
from posttrain.losses.projection import HeadGradients, add_widened, token_chunks

N, D, V, K = 70, 16, 50, 8
VALUE, GRADIENT = 0.001, 0.03
"""Distance to float32 from the same rounded inputs, relative to its size. bfloat16 has 8 bits: one
rounding is up to .004."""
Loss = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and bias, all of which bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,))
    hidden_ND, head_VD, bias_V = (
        torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes
    )
    return 2 * hidden_ND, head_VD / 2, bias_V


def weights() -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(1))


def likelihood(hidden: Tensor, head: Tensor, bias: Tensor, temperature: float, most: int) -> Tensor:
    targets_N = torch.arange(N) % V
    logp_N, entropy_N = token_logprobs(
        hidden, head, targets_N, bias_V=bias, temperature=temperature, max_elements=most
    )
    assert logp_N.dtype == entropy_N.dtype == torch.float32
    return -(logp_N * weights()).sum()


def to_teachers(kind: Divergence) -> Loss:
    def loss(hidden: Tensor, head: Tensor, bias: Tensor, temperature: float, most: int) -> Tensor:
        states_NE, head_VE, bias_V = (x.to(hidden.dtype).flip(0) for x in inputs())
        # A teacher of 33 tokens, one of none and one of the others.
        teachers = [
            TeacherStates(hidden_NE=part, head_VE=head_VE, bias_V=bias_V)
            for part in states_NE.split([33, 0, N - 33])
        ]
        return full_vocabulary(
            hidden,
            head,
            teachers,
            weights(),
            bias_V=bias,
            divergence=kind,
            temperature=temperature,
            max_elements=most,
        )[0]

    return loss


def on_top_k(hidden: Tensor, head: Tensor, bias: Tensor, temperature: float, most: int) -> Tensor:
    # The same set for both types: near the edge rounding would choose another.
    states_NE, head_VE, _ = (x.flip(0) for x in inputs())
    ids_NK, logp_NK = teacher_top_k_targets(states_NE, head_VE, K, temperature=temperature)
    return top_k(
        hidden,
        head,
        ids_NK,
        logp_NK,
        weights(),
        bias_V=bias,
        temperature=temperature,
        max_elements=most,
    )[0]


LOSSES: dict[str, Loss] = {
    "likelihood": likelihood,
    "reverse": to_teachers("reverse_kl"),
    "forward": to_teachers("forward_kl"),
    "jsd": to_teachers("jsd"),
    "top_k": on_top_k,
}


def outcome(loss: Loss, dtype: torch.dtype, temperature: float, most: int) -> list[Tensor]:
    """The value, and the gradients of hidden states, head and bias."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs()]
    value = loss(leaves[0], leaves[1], leaves[2], temperature, most)
    assert value.dtype == torch.float32
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("most", [2**26, 20 * V], ids=["whole", "chunks"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_near_float32(name: str, temperature: float, most: int) -> None:
    exact = outcome(LOSSES[name], torch.float32, temperature, 2**26)
    narrow = outcome(LOSSES[name], torch.bfloat16, temperature, most)
    for i, (one, other) in enumerate(zip(narrow, exact, strict=True)):
        distance = float((one.float() - other).norm() / other.norm())
        assert distance < (GRADIENT if i else VALUE), f"output {i}"


def test_a_softmax_that_is_not_kept_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = outcome(likelihood, torch.bfloat16, 0.7, 2**26)
    monkeypatch.setattr(ops, "_KEEP_ELEMENTS", 0)
    computed = outcome(likelihood, torch.bfloat16, 0.7, 2**26)
    for one, other in zip(kept, computed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_sure_target_keeps_its_small_gradient() -> None:
    """1 - p is taken in float32: in bfloat16 it would be 0 or .004 for all p above .994."""
    hidden_ND = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    head_VD = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16)
    logp_N, _ = token_logprobs(hidden_ND, head_VD, torch.tensor([0]))
    logp_N.sum().backward()
    # d logp / d hidden = 8 (1 - p), with 1 - p = 1 / (1 + e^8).
    assert hidden_ND.grad is not None
    assert float(hidden_ND.grad) == pytest.approx(
        8 / (1 + float(torch.tensor(8.0).exp())), rel=0.01
    )


def test_chunks_of_a_narrow_type_have_twice_the_tokens() -> None:
    wide, narrow = (
        next(token_chunks(10_000, 50_000, 2**26, dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (wide.stop, narrow.stop) == (256, 512)
    # The bound on elements holds for both.
    assert next(token_chunks(10_000, 50_000, 50_000, torch.bfloat16)).stop == 1


def test_many_narrow_chunks_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in bfloat16 would stop growing at 256: 256 + 1 is 256 there."""
    monkeypatch.setattr(projection, "_HEAD_ROWS", 2)
    ones_ND = torch.ones(1000, 1, dtype=torch.bfloat16)
    head_VD = torch.ones(3, 1, dtype=torch.bfloat16)
    sums = HeadGradients(ones_ND, head_VD, None, (True, True, False))
    for token in range(1000):
        chunk = slice(token, token + 1)
        sums.add(chunk, torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(1))
    grad_ND, grad_VD, _ = sums.result()
    assert torch.equal(grad_VD, torch.full_like(head_VD, 1000))
    assert torch.equal(grad_ND, torch.full_like(ones_ND, 3))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (2, 3, 4)])
def test_adding_in_parts_is_adding(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "_PART_ELEMENTS", 8)
    generator = torch.Generator().manual_seed(0)
    total, addend = (torch.randn(shape, generator=generator) for _ in range(2))
    expected = total + addend.bfloat16()
    add_widened(total, addend.bfloat16())
    assert torch.equal(total, expected)
