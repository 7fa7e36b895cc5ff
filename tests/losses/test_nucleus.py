"""Log-probabilities over a part of the vocabulary against hand-derived values."""

import math

import pytest
import torch
from torch import Tensor

from posttrain.losses.nucleus import nucleus_logprobs
from posttrain.losses.ops import token_logprobs

TOKENS, HIDDEN, VOCABULARY = 6, 4, 7


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head and bias, float64; targets, and a mask that holds each."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    mask_NV = torch.rand(TOKENS, VOCABULARY, generator=generator) < 0.5
    mask_NV[torch.arange(TOKENS), targets_N] = True
    leaves = [x.requires_grad_() for x in (hidden_ND, head_VD, bias_V)]
    return leaves[0], leaves[1], leaves[2], targets_N, mask_NV


def ragged(mask_NV: Tensor) -> tuple[Tensor, Tensor]:
    return mask_NV.nonzero()[:, 1].to(torch.int32), mask_NV.sum(1)


def test_by_hand() -> None:
    """Ids 0 to 3 weigh 1 to 4. Of {1, 2}, which weigh 2 and 3, p(2) = 3/5; {3} alone has p = 1."""
    head_VD = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64).log()
    hidden_ND = torch.ones(2, 1, dtype=torch.float64)
    ids_F, count_N = torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([2, 1])
    targets_N = torch.tensor([2, 3])
    logp_N, entropy_N = nucleus_logprobs(hidden_ND, head_VD, targets_N, ids_F, count_N)
    assert logp_N.tolist() == pytest.approx([math.log(0.6), 0.0])
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    assert entropy_N.tolist() == pytest.approx([entropy, 0.0])
    # At temperature 1/2 the weights are squares: 9 / (4 + 9).
    cold_N, _ = nucleus_logprobs(hidden_ND, head_VD, targets_N, ids_F, count_N, temperature=0.5)
    assert cold_N.tolist() == pytest.approx([math.log(9 / 13), 0.0])


@pytest.mark.parametrize("max_elements", [2**22, 2 * VOCABULARY, 1])
def test_a_dense_computation_and_its_gradients_are_the_same(max_elements: int) -> None:
    hidden_ND, head_VD, bias_V, targets_N, mask_NV = make_inputs()
    logp_N, _ = nucleus_logprobs(
        hidden_ND,
        head_VD,
        targets_N,
        *ragged(mask_NV),
        bias_V=bias_V,
        temperature=0.7,
        max_elements=max_elements,
    )
    weight_NV = ((hidden_ND @ head_VD.T + bias_V) / 0.7).exp() * mask_NV
    dense_NV = weight_NV / weight_NV.sum(1, keepdim=True)
    dense_N = dense_NV.gather(1, targets_N[:, None])[:, 0].log()
    torch.testing.assert_close(logp_N, dense_N)
    scale_N = torch.arange(1.0, TOKENS + 1, dtype=torch.float64)
    leaves = (hidden_ND, head_VD, bias_V)
    found = torch.autograd.grad((scale_N * logp_N).sum(), leaves)
    for mine, dense in zip(
        found, torch.autograd.grad((scale_N * dense_N).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, dense)


def test_gradcheck() -> None:
    hidden_ND, head_VD, bias_V, targets_N, mask_NV = make_inputs()

    def logp(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor) -> Tensor:
        nucleus = ragged(mask_NV)
        return nucleus_logprobs(
            hidden_ND, head_VD, targets_N, *nucleus, bias_V=bias_V, temperature=0.7, max_elements=20
        )[0]

    assert torch.autograd.gradcheck(logp, (hidden_ND, head_VD, bias_V))


def test_with_every_id_in_the_nucleus_they_are_those_of_the_vocabulary() -> None:
    hidden_ND, head_VD, bias_V, targets_N, mask_NV = make_inputs()
    nucleus = ragged(torch.ones_like(mask_NV))
    found = nucleus_logprobs(hidden_ND, head_VD, targets_N, *nucleus, bias_V=bias_V)
    for mine, whole in zip(
        found, token_logprobs(hidden_ND, head_VD, targets_N, bias_V=bias_V), strict=True
    ):
        torch.testing.assert_close(mine, whole)


def test_no_tokens_and_counts_that_do_not_fit() -> None:
    hidden_ND, head_VD, _, targets_N, mask_NV = make_inputs()
    ids_F, count_N = ragged(mask_NV)
    none = (targets_N[:0], ids_F[:0], count_N[:0])
    logp_N, entropy_N = nucleus_logprobs(hidden_ND[:0], head_VD, *none)
    assert logp_N.shape == entropy_N.shape == (0,)
    with pytest.raises(ValueError, match="count_N sums to"):
        nucleus_logprobs(hidden_ND, head_VD, targets_N, ids_F[1:], count_N)
    with pytest.raises(ValueError, match="count_N"):
        nucleus_logprobs(hidden_ND, head_VD, targets_N, ids_F, count_N[1:])
