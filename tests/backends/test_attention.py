"""Attention and the norm of layers in bfloat16: gradients, and torch's own numbers.

Legend as in `attention.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backends.cpu import attention, norm
from posttrain.backends.cpu.attention import causal_attention
from posttrain.backends.cpu.flat import _fused_attention
from posttrain.backends.cpu.norm import rms_norm

SHAPE = {"bins": 2, "positions": 7, "width": 3}
SCALE = 0.3


def states(heads: int, *, seed: int, dtype: torch.dtype = torch.float64, **shape: int) -> Tensor:
    sizes = SHAPE | shape
    generator = torch.Generator().manual_seed(seed)
    size = (sizes["bins"], sizes["positions"], heads, sizes["width"])
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def shared_prompt(bins: int, positions: int, dtype: torch.dtype) -> Tensor:
    """A prompt of 3 positions, a row of 2 after it, and another row that does not see that one."""
    visible_TT = torch.ones(positions, positions, dtype=torch.bool).tril()
    visible_TT[5:, 3:5] = False
    mask_TT = torch.zeros(positions, positions, dtype=dtype).masked_fill(~visible_TT, -torch.inf)
    return mask_TT.expand(bins, 1, -1, -1)


def mask_of(kind: str, dtype: torch.dtype, **shape: int) -> Tensor | None:
    sizes = SHAPE | shape
    return None if kind == "causal" else shared_prompt(sizes["bins"], sizes["positions"], dtype)


@pytest.fixture(params=[2, 3, 100])
def queries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Positions of a block: several blocks, the last one shorter, and one for all."""
    monkeypatch.setattr(attention, "QUERIES", request.param)
    return int(request.param)


@pytest.mark.parametrize("kind", ["causal", "shared"])
@pytest.mark.parametrize("query_heads", [2, 6])
def test_gradients_of_attention_are_those_of_finite_differences(
    kind: str, query_heads: int, queries: int
) -> None:
    mask = mask_of(kind, torch.float64)
    inputs = tuple(states(h, seed=i) for i, h in enumerate((query_heads, 2, 2)))
    assert torch.autograd.gradcheck(
        lambda q, k, v: causal_attention(q, k, v, mask, SCALE),
        inputs,
    )


@pytest.mark.parametrize("kind", ["causal", "shared"])
def test_attention_is_that_of_torch(kind: str, queries: int) -> None:
    mask = mask_of(kind, torch.float64)
    mine, theirs = (
        outcome(function, mask, torch.float64) for function in (causal_attention, _fused_attention)
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def outcome(
    function: Any, mask: Tensor | None, dtype: torch.dtype, **shape: int
) -> tuple[Tensor, ...]:
    """Output and the three gradients, for weights that are the same in every call."""
    inputs = [states(h, seed=i, dtype=dtype, **shape) for i, h in enumerate((6, 2, 2))]
    attended = function(*inputs, mask, SCALE)
    attended.backward(states(6, seed=9, dtype=dtype, **shape).detach())
    return attended.detach(), *(one.grad for one in inputs)


@pytest.mark.parametrize("kind", ["causal", "shared"])
def test_in_bfloat16_it_is_as_near_to_float32_as_torchs(kind: str) -> None:
    """Scores are rounded, which torch's own keeps in float32: at most twice its distance."""
    shape = {"positions": 200, "width": 64}
    mask = mask_of(kind, torch.float32, **shape)
    narrow = None if mask is None else mask.bfloat16()
    true = outcome(_fused_attention, mask, torch.float32, **shape)
    mine = outcome(causal_attention, narrow, torch.bfloat16, **shape)
    theirs = outcome(_fused_attention, narrow, torch.bfloat16, **shape)
    for exact, one, other in zip(true, mine, theirs, strict=True):
        assert one.dtype == torch.bfloat16
        assert distance(one, exact) <= 2 * distance(other, exact) < 0.02


def distance(one: Tensor, exact: Tensor) -> float:
    """Relative to the size of the exact numbers."""
    return float((one.float() - exact).norm() / exact.norm())


def test_what_comes_later_changes_nothing() -> None:
    query, key, value = (states(2, seed=i).detach() for i in range(3))
    before = causal_attention(query, key, value, None, SCALE)
    for tensor in (query, key, value):
        tensor[:, 4:] += 1.0
    after = causal_attention(query, key, value, None, SCALE)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


@pytest.fixture(params=[12, 10_000])
def elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two tokens, and one for all."""
    monkeypatch.setattr(norm, "BLOCK_ELEMENTS", request.param)


def rows(*, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states_MD = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    weight_D = torch.rand(6, generator=generator, dtype=torch.float64)
    return states_MD.to(dtype).requires_grad_(), weight_D.to(dtype).requires_grad_()


@pytest.mark.usefixtures("elements")
def test_gradients_of_the_norm_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), rows())


@pytest.mark.usefixtures("elements")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2**-7)])
def test_the_norm_is_that_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    exact_MD, exact_D = rows()
    exact = torch.nn.functional.rms_norm(exact_MD, (6,), exact_D, 1e-3)
    exact.sum().backward()
    states_MD, weight_D = rows(dtype=dtype)
    normed_MD = rms_norm(states_MD, weight_D, 1e-3)
    assert normed_MD.dtype == dtype
    normed_MD.sum().backward()
    pairs = [(normed_MD, exact), (states_MD.grad, exact_MD.grad), (weight_D.grad, exact_D.grad)]
    for one, other in pairs:
        assert one is not None and other is not None
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_a_norm_without_gradient_for_its_weight() -> None:
    states_MD, weight_D = rows()
    rms_norm(states_MD, weight_D.detach(), 1e-3).sum().backward()
    expected_MD, _ = rows()
    torch.nn.functional.rms_norm(expected_MD, (6,), weight_D.detach(), 1e-3).sum().backward()
    torch.testing.assert_close(states_MD.grad, expected_MD.grad)
