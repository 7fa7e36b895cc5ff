"""A learner in bfloat16: the copy computes, the float32 weights learn.

Legend: N sampled tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backends.base import LearnerSettings, Metrics, TokenLoss
from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.cpu.fused import FusedDecoder
from posttrain.backends.local import LocalLearner, LocalSampler
from posttrain.backends.precision import computing_copy
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]
BF16 = torch.bfloat16


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = [(3, 2), (7, 5), (1, 1), (4, 6), (5, 5), (2, 9)]
    prompts, responses = (
        [torch.randint(5, 90, (pair[i],), generator=generator).tolist() for pair in lengths]
        for i in range(2)
    )
    return Batch.from_tokens(prompts, responses, pad_id=0)


def learner(language_model: LanguageModel, **options: Any) -> LocalLearner:
    settings = {"weight_decay": 0.0, "max_grad_norm": 1.0, "dtype": BF16} | options
    machine = {k: settings.pop(k) for k in ("max_tokens", "compile", "workers") if k in settings}
    return LocalLearner(language_model, LearnerSettings(betas=(0.9, 0.98), **settings), **machine)


def negative_logp(
    _: Any, logp_N: Tensor, entropy_N: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    assert logp_N.dtype == torch.float32, "the softmax is float32"
    return -logp_N.sum(), {"loss": -logp_N.sum().detach()}


CROSS_ENTROPY = TokenLoss(negative_logp)


def update(mine: LocalLearner, lr: float) -> dict[str, float]:
    rollouts = batch()
    return mine.update(rollouts, CROSS_ENTROPY, count=rollouts.num_tokens, lr=lr)


def test_in_float32_nothing_is_copied(make_model: MakeModel) -> None:
    language_model = make_model()
    mine = learner(language_model, dtype=torch.float32)
    assert mine.policy is language_model
    assert all(a is b for a, b in zip(mine.copies, mine.parameters, strict=True))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_small_steps_are_learned_in_float32(make_model: MakeModel, kind: str) -> None:
    """At lr 1e-5 an update is far below what bfloat16 resolves of a weight near 0.3."""
    language_model = make_model(kind)
    before = [p.detach().clone() for p in language_model.model.parameters()]
    mine = learner(language_model)
    assert {p.dtype for p in mine.copies} == {BF16}
    assert {p.dtype for p in mine.parameters} == {torch.float32}
    for _ in range(3):
        update(mine, lr=1e-5)
    for old, new, copied in zip(before, mine.parameters, mine.copies, strict=True):
        assert not torch.equal(old, new)
        assert torch.equal(copied, new.to(BF16)), "the copy is the newest weights, rounded"
        assert copied.grad is None
    moments = [s for state in mine.optimizer.adamw.state.values() for s in state.values()]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert language_model.model.config.dtype != BF16


@pytest.mark.parametrize("max_tokens", [20, 8192])
def test_gradients_come_near_those_of_float32(make_model: MakeModel, max_tokens: int) -> None:
    """One micro-batch or several: their gradients are added up in float32."""
    results = []
    for dtype in (torch.float32, BF16):
        mine = learner(make_model(), dtype=dtype, max_tokens=max_tokens)
        results.append(update(mine, lr=0.0))
    exact, rounded = results
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_a_restored_learner_goes_on_with_the_same_bits(make_model: MakeModel) -> None:
    mine = learner(make_model())
    update(mine, lr=1e-3)
    state = {name: value.clone() for name, value in mine.state().items()}
    assert {value.dtype for value in state.values()} == {torch.float32}
    other = learner(make_model(seed=1))
    other.restore(state)
    assert update(mine, lr=1e-3) == update(other, lr=1e-3)
    for a, b in zip(mine.parameters, other.parameters, strict=True):
        assert torch.equal(a, b)


def test_what_transformers_keeps_in_float32_stays(make_model: MakeModel) -> None:
    language_model = make_model()
    language_model.model._keep_in_fp32_modules_strict = {"q_norm"}
    copied = computing_copy(language_model, BF16).model
    kinds = {name: p.dtype for name, p in copied.named_parameters()}
    assert {d for n, d in kinds.items() if ".q_norm." in n} == {torch.float32}
    assert {d for n, d in kinds.items() if ".q_norm." not in n} == {BF16}
    # Positions in bfloat16 would be wrong from 256 on.
    assert {buffer.dtype for buffer in copied.buffers()} == {torch.float32}
    assert copied.lm_head.weight is copied.model.embed_tokens.weight, "still tied"


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_fused_decoder_is_as_exact_as_transformers(make_model: MakeModel, kind: str) -> None:
    """Both decode in bfloat16; their log-probs stray from float32 by like amounts."""
    language_model = make_model(kind)
    exact = learner(language_model, dtype=torch.float32)
    policy = computing_copy(language_model, BF16)
    sampler = LocalSampler(policy)
    decoder = sampler.decoders.make(2, 8)
    assert isinstance(decoder, FusedDecoder) and decoder.cache.tensor.dtype == BF16
    plain = LocalSampler(policy, fast_paths=False)
    strays = []
    for which in (sampler, plain):
        rollouts = which.sample(
            [[11, 12, 13], [20, 21], [30, 31, 32, 33]],
            group_size=20,
            max_new_tokens=12,
            temperature=1.0,
            seed=0,
        )
        difference_N = rollouts["sampler_logp_N"] - exact.logprobs(rollouts, temperature=1.0)
        strays.append(float(difference_N.abs().mean()))
    assert 0 < strays[0] < 2 * strays[1]
    assert strays[1] < 0.1


@pytest.mark.slow
def test_a_compiled_learner_learns_the_same(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of two shapes go through one traced model; generating code for it takes a minute."""
    traced = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    rollouts = batch()
    short = rollouts.select(torch.arange(2))
    results = []
    for compile in (False, True):
        mine = learner(make_model(), dtype=torch.float32, compile=compile)
        found = []
        for part in (rollouts, short, rollouts):
            found.append(mine.update(part, CROSS_ENTROPY, count=part.num_tokens, lr=1e-3))
        results.append(found)
        assert (mine.body is not None) == compile
    for plain, compiled in zip(*results, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-4)
