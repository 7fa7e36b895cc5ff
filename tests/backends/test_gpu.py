"""On a real CUDA device: the sampler against `generate`, packing, and a compiled learner.

Legend: N sampled tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backends.base import LearnerSettings, Metrics, TokenLoss
from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.local import LocalLearner, LocalSampler, LocalScorer
from posttrain.rl.batch import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
MakeModel = Callable[..., LanguageModel]
KINDS = ["qwen3", "llama", "gpt2"]
PROMPTS = [[11, 12, 13], [20, 21, 22, 23, 24, 25, 26], [30], [40, 41, 42, 43, 44, 45], [50, 51]]
STOPS = list(range(4, 100, 4))


def on_cuda(language_model: LanguageModel) -> LanguageModel:
    language_model.model.to("cuda")
    return language_model


def sample(language_model: LanguageModel, temperature: float = 1.0) -> Batch:
    return LocalSampler(language_model, max_rows=7).sample(
        PROMPTS, group_size=3, max_new_tokens=12, temperature=temperature, seed=3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_generate(make_model: MakeModel, kind: str) -> None:
    language_model = on_cuda(make_model(kind, stop=STOPS))
    responses = sample(language_model, temperature=0.0).responses()
    for number, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([prompt], device="cuda")
        found = language_model.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12
        )
        assert responses[3 * number : 3 * number + 3] == [found[0, len(prompt) :].tolist()] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_those_of_the_cpu(make_model: MakeModel, kind: str) -> None:
    there = sample(on_cuda(make_model(kind, stop=STOPS)))
    here = sample(make_model(kind, stop=STOPS))
    assert there.tokens_BT.device.type == "cpu"
    assert there.responses() == here.responses()
    assert torch.allclose(there["sampler_logp_N"], here["sampler_logp_N"], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_rows_alone(make_model: MakeModel, kind: str) -> None:
    language_model = on_cuda(make_model(kind, stop=STOPS))
    rollouts = sample(language_model)
    scorer = LocalScorer(language_model)
    alone = [scorer.hidden(rollouts.select(torch.tensor([row]))) for row in range(len(rollouts))]
    packed_ND = scorer.hidden(rollouts)
    assert packed_ND.device.type == "cuda"
    assert torch.allclose(packed_ND, torch.cat(alone), atol=1e-4)


def negative_logp(
    _: Any, logp_N: Tensor, entropy_N: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    return -logp_N.sum(), {"loss": -logp_N.sum().detach()}


CROSS_ENTROPY = TokenLoss(negative_logp)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_learner_learns_the_same(make_model: MakeModel, dtype: torch.dtype) -> None:
    rollouts = sample(make_model(stop=STOPS))
    results = []
    for compile in (False, True):
        learner = LocalLearner(
            on_cuda(make_model(stop=STOPS)),
            LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0, dtype=dtype),
            compile=compile,
        )
        parts = (rollouts, rollouts.select(torch.arange(4)), rollouts)
        results.append(
            [learner.update(part, CROSS_ENTROPY, count=part.num_tokens, lr=1e-3) for part in parts]
        )
    near = 1e-3 if dtype == torch.float32 else 0.05
    for plain, compiled in zip(*results, strict=True):
        assert compiled == pytest.approx(plain, rel=near)
