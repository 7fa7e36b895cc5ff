"""Log-probabilities, aggregation weights and KL estimators against hand-derived values."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.losses.ops import aggregation_weights, kl_estimate, same_shape, token_logprobs

TOKENS, HIDDEN, VOCABULARY = 9, 5, 12


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden_ND, head_VD, bias_V)]
    return leaves[0], leaves[1], leaves[2], targets_N


def test_token_logprobs_by_hand():
    """Logits (0, log 3) give p = (1/4, 3/4); at temperature 1/2, (0, 2 log 3) give (1/10, 9/10)."""
    hidden_ND = torch.ones(2, 1, dtype=torch.float64)
    head_VD = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    targets_N = torch.tensor([0, 1])
    logp_N, entropy_N = token_logprobs(hidden_ND, head_VD, targets_N)
    assert logp_N.tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy_N.tolist() == pytest.approx([entropy, entropy])
    cold_N, _ = token_logprobs(hidden_ND, head_VD, targets_N, temperature=0.5)
    assert cold_N.tolist() == pytest.approx([math.log(0.1), math.log(0.9)])
    biased_N, _ = token_logprobs(
        hidden_ND, head_VD, targets_N, bias_V=torch.tensor([math.log(3), 0.0], dtype=torch.float64)
    )
    assert biased_N.tolist() == pytest.approx([math.log(0.5)] * 2)


@pytest.mark.parametrize("max_elements", [2**22, 3 * VOCABULARY, 1])
def test_token_logprobs_gradcheck(max_elements: int):
    hidden_ND, head_VD, bias_V, targets_N = make_inputs()

    def logp(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor) -> Tensor:
        return token_logprobs(
            hidden_ND,
            head_VD,
            targets_N,
            bias_V=bias_V,
            temperature=0.7,
            max_elements=max_elements,
        )[0]

    assert torch.autograd.gradcheck(logp, (hidden_ND, head_VD, bias_V))


@pytest.mark.parametrize("max_elements", [2**22, 4 * VOCABULARY, 1])
def test_token_logprobs_equal_plain_autograd(max_elements: int):
    hidden_ND, head_VD, bias_V, targets_N = make_inputs()
    upstream_N = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    logp_N, entropy_N = token_logprobs(
        hidden_ND, head_VD, targets_N, bias_V=bias_V, temperature=1.3, max_elements=max_elements
    )
    leaves = (hidden_ND, head_VD, bias_V)
    grads = torch.autograd.grad((logp_N * upstream_N).sum(), leaves)
    logp_NV = torch.log_softmax((hidden_ND @ head_VD.T + bias_V) / 1.3, -1)
    naive_N = logp_NV[torch.arange(TOKENS), targets_N]
    naive_grads = torch.autograd.grad((naive_N * upstream_N).sum(), leaves)
    torch.testing.assert_close(logp_N, naive_N, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy_N, -(logp_NV.exp() * logp_NV).sum(-1).detach())
    torch.testing.assert_close(grads, naive_grads, rtol=1e-12, atol=1e-12)
    assert not entropy_N.requires_grad


def test_gradients_only_for_what_needs_them():
    hidden_ND, head_VD, _, targets_N = make_inputs()
    frozen_VD = head_VD.detach()
    logp_N, _ = token_logprobs(hidden_ND, frozen_VD, targets_N)
    logp_N.sum().backward()
    assert hidden_ND.grad is not None
    with torch.no_grad():
        assert not token_logprobs(hidden_ND, head_VD, targets_N)[0].requires_grad


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        for output in outputs:
            if isinstance(output, Tensor):
                self.elements = max(self.elements, output.numel())
        return result


def test_no_whole_matrix_of_logits():
    """40 tokens * 64 words = 2,560 elements; at most 256 (4 tokens) may ever exist."""
    generator = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(40, 2, generator=generator).requires_grad_()
    head_VD = torch.randn(64, 2, generator=generator).requires_grad_()
    targets_N = torch.randint(64, (40,), generator=generator)
    with LargestTensor() as largest:
        logp_N, _ = token_logprobs(hidden_ND, head_VD, targets_N, max_elements=256)
        logp_N.sum().backward()
    assert largest.elements == 256
    with LargestTensor() as largest:
        token_logprobs(hidden_ND, head_VD, targets_N)[0].sum().backward()
    assert largest.elements == 2560


def test_bfloat16_softmax_is_float32():
    """Only the logits are rounded to bfloat16; their log-softmax is that of float32."""
    hidden_ND, head_VD, _, targets_N = make_inputs(torch.bfloat16)
    logp_N, entropy_N = token_logprobs(hidden_ND, head_VD, targets_N)
    logp_NV = torch.log_softmax((hidden_ND @ head_VD.T).float(), -1)
    assert logp_N.dtype == entropy_N.dtype == torch.float32
    torch.testing.assert_close(logp_N, logp_NV[torch.arange(TOKENS), targets_N], rtol=0, atol=0)
    logp_N.sum().backward()
    assert hidden_ND.grad is not None and hidden_ND.grad.dtype == torch.bfloat16
    assert head_VD.grad is not None and head_VD.grad.dtype == torch.bfloat16


def test_head_of_another_type_keeps_its_gradient_type():
    hidden_ND, _, _, targets_N = make_inputs(torch.bfloat16)
    _, head_VD, _, _ = make_inputs(torch.float32)
    token_logprobs(hidden_ND, head_VD, targets_N)[0].sum().backward()
    assert head_VD.grad is not None and head_VD.grad.dtype == torch.float32


def test_no_tokens():
    hidden_ND, head_VD, _, _ = make_inputs()
    logp_N, entropy_N = token_logprobs(hidden_ND[:0], head_VD, torch.empty(0, dtype=torch.int64))
    logp_N.sum().backward()
    assert logp_N.shape == entropy_N.shape == (0,)
    assert head_VD.grad is not None and head_VD.grad.abs().sum() == 0


def test_errors_name_the_shapes():
    hidden_ND, head_VD, bias_V, targets_N = make_inputs()
    with pytest.raises(ValueError, match=r"hidden \(9, 4\) .* head \(12, 5\)"):
        token_logprobs(hidden_ND[:, :4], head_VD, targets_N)
    with pytest.raises(ValueError, match=r"targets_N \(3,\), hidden_N \(9,\)"):
        token_logprobs(hidden_ND, head_VD, targets_N[:3])
    with pytest.raises(ValueError, match=r"bias \(3,\)"):
        token_logprobs(hidden_ND, head_VD, targets_N, bias_V=bias_V[:3])
    with pytest.raises(ValueError, match="temperature: 0"):
        token_logprobs(hidden_ND, head_VD, targets_N, temperature=0.0)
    with pytest.raises(ValueError, match="max_elements: 0"):
        token_logprobs(hidden_ND, head_VD, targets_N, max_elements=0)
    with pytest.raises(ValueError, match=r"first \(2,\), second \(3,\)"):
        same_shape(first=torch.zeros(2), second=torch.zeros(3), absent=None)


def test_aggregation_weights_by_hand():
    """Row 0 has 3 tokens, row 1 none, row 2 one.

    token: every token 1, divided by 4. sequence: 1/3 and 1, divided by the 2 rows with tokens.
    constant 10: 1/10, divided by all 3 rows.
    """
    row_N = torch.tensor([0, 0, 0, 2])
    weight_N, count = aggregation_weights(row_N, 3, aggregation="token")
    assert (weight_N.tolist(), count) == ([1.0] * 4, 4.0)
    weight_N, count = aggregation_weights(row_N, 3, aggregation="sequence")
    assert (weight_N.tolist(), count) == (pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0]), 2.0)
    weight_N, count = aggregation_weights(row_N, 3, aggregation="constant", constant=10)
    assert (weight_N.tolist(), count) == (pytest.approx([0.1] * 4), 3.0)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_aggregation_weights_of_parts(aggregation: str):
    """Rows 0-1 and rows 2-3 in two calls: the same weights, and the counts add up."""
    row_N = torch.tensor([0, 0, 1, 3, 3, 3])
    weight_N, count = aggregation_weights(row_N, 4, aggregation=aggregation, constant=7)
    first_N, first = aggregation_weights(row_N[:3], 2, aggregation=aggregation, constant=7)
    second_N, second = aggregation_weights(row_N[3:] - 2, 2, aggregation=aggregation, constant=7)
    assert weight_N.tolist() == torch.cat([first_N, second_N]).tolist()
    assert count == first + second


def test_aggregation_errors():
    row_N = torch.tensor([0])
    with pytest.raises(ValueError, match=r"'mean' is not one of token, sequence, constant"):
        aggregation_weights(row_N, 1, aggregation="mean")
    with pytest.raises(ValueError, match="constant: None"):
        aggregation_weights(row_N, 1, aggregation="constant")
    with pytest.raises(ValueError, match="constant: 0"):
        aggregation_weights(row_N, 1, aggregation="constant", constant=0)


def test_kl_estimate_by_hand():
    """p = 1/2, reference 1/4: d = log 2; k2 = d^2 / 2; k3 = 1/2 - 1 + d."""
    logp_N, ref_logp_N = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    d = math.log(2)
    for estimator, value in (("k1", d), ("k2", d * d / 2), ("k3", 0.5 - 1 + d)):
        result = kl_estimate(logp_N, ref_logp_N, estimator=estimator)
        assert result.item() == pytest.approx(value, rel=1e-6)
    with pytest.raises(ValueError, match=r"'k4' is not one of k1, k2, k3"):
        kl_estimate(logp_N, ref_logp_N, estimator="k4")


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_kl_estimate_expectation(estimator: str, unbiased: bool):
    """The mean over tokens, weighted with p, is KL(p || reference) for k1 and k3, not for k2."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, VOCABULARY, generator=generator, dtype=torch.float64)
    logp_V, ref_V = torch.log_softmax(logits, -1)
    kl = (logp_V.exp() * (logp_V - ref_V)).sum()
    mean = (logp_V.exp() * kl_estimate(logp_V, ref_V, estimator=estimator)).sum()
    assert (abs(mean - kl).item() < 1e-12) == unbiased
