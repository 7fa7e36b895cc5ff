"""The local backend through its seam: the reference and its fast paths agree, rows with several
sampled spans are what a plain forward pass makes of them, and weights go where they should.

Legend: B rows, T positions, N sampled tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backends.base import (
    Backend,
    Head,
    HeadLoss,
    Learner,
    LearnerSettings,
    Loss,
    Metrics,
    Sampler,
    Scorer,
    TokenLoss,
)
from posttrain.backends.checkpoint import LanguageModel, load, save
from posttrain.backends.forward import forward_passes
from posttrain.backends.local import LocalBackend, LocalLearner, LocalSampler, LocalScorer
from posttrain.backends.scalar import load_scalar, rewards_B, scores_N
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]
SETTINGS = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.1, max_grad_norm=1.0)
STOPS = list(range(4, 100, 4))
PROMPTS = [[11, 12, 13], [20, 21, 22, 23, 24, 25, 26], [30]]
# Flat rows, bins, and padded rows: attention, a window, a recurrence, a convolution.
KINDS = ("qwen3", "llama", "gpt2", "olmoe", "mistral", "mamba2", "lfm2")


def turns(seed: int = 0) -> Batch:
    """Pairs of rows after one prompt: two or three turns with text of a tool between them, and
    after the last in some. Columns for the losses below."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in PROMPTS:
        for lengths in ((3, 4, 2), (1, 9, 1, 2, 5, 3)):
            ids = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]
            spans = [(part, number % 2 == 0) for number, part in enumerate(ids)]
            rows.append([(prompt, False), *spans])
    batch = Batch.from_spans(rows, pad_id=0)
    batch["weight_N"] = torch.linspace(-1, 1, batch.num_tokens)
    batch["weight_B"] = torch.linspace(1, 2, len(batch))
    return batch


def weighted(
    scale: float, logp_N: Tensor, entropy_N: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    """A loss that shows every mix-up of rows and tokens."""
    assert not entropy_N.requires_grad
    weight_N = batch["weight_N"] * batch["weight_B"][batch.row_N] * batch.targets_N
    return (scale * weight_N * logp_N).sum(), {"logp": (weight_N * logp_N).sum().detach()}


def weighted_logits(
    scale: float, hidden_ND: Tensor, head: Head, batch: Batch
) -> tuple[Tensor, Metrics]:
    """The same from hidden states."""
    logits_NV = torch.nn.functional.linear(hidden_ND, head.weight_VD, head.bias_V).float()
    logp_N = torch.log_softmax(logits_NV, -1).gather(1, batch.targets_N[:, None])[:, 0]
    return weighted(scale, logp_N, logp_N.detach(), batch)


LOSSES: dict[str, Loss] = {
    "token": TokenLoss(weighted, 0.01),
    "head": HeadLoss(weighted_logits, 0.01),
}


def plain_logprobs(model: Any, batch: Batch) -> Tensor:
    """`logp_N` by transformers alone, one row at a time."""
    parts = []
    for number, row_T in enumerate(batch.tokens_BT):
        length = int(batch.length_B[number])
        logits_TV = model(input_ids=row_T[None, :length], use_cache=False).logits[0]
        logp_TV = torch.log_softmax(logits_TV[:-1].float(), -1)
        logp_T = logp_TV.gather(1, row_T[1:length, None])[:, 0]
        parts.append(logp_T[batch.sampled_BT[number, 1:length]])
    return torch.cat(parts)


def any_model(make_model: MakeModel, make_family: MakeModel, kind: str) -> LanguageModel:
    return (make_model if kind in ("qwen3", "llama", "gpt2") else make_family)(kind, stop=STOPS)


@pytest.mark.parametrize("fast_paths", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_several_spans_are_what_a_row_alone_gives(
    make_model: MakeModel, make_family: MakeModel, kind: str, fast_paths: bool
) -> None:
    """Log-probs of scorer and learner, the likeliest tokens, and the loss of an update."""
    language_model, batch = any_model(make_model, make_family, kind), turns()
    with torch.no_grad():
        expected_N = plain_logprobs(language_model.model, batch)
    for max_tokens in (30, 10_000):
        scorer = LocalScorer(language_model, max_tokens=max_tokens, fast_paths=fast_paths)
        torch.testing.assert_close(scorer.logprobs(batch), expected_N, atol=5e-5, rtol=1e-4)
        ids_NK, logp_NK = scorer.top_k(batch, 1000)
        assert ids_NK.shape[1] == len(scorer.head.weight_VD)
        found_N = logp_NK[ids_NK == batch.targets_N[:, None]]
        torch.testing.assert_close(found_N, expected_N, atol=5e-5, rtol=1e-4)
    learner = LocalLearner(language_model, SETTINGS, max_tokens=30, fast_paths=fast_paths)
    torch.testing.assert_close(learner.logprobs(batch), expected_N, atol=5e-5, rtol=1e-4)
    weight_N = batch["weight_N"] * batch["weight_B"][batch.row_N] * batch.targets_N
    metrics = learner.update(batch, LOSSES["token"], count=1.0, lr=0.0)
    assert metrics["logp"] == pytest.approx(float((weight_N * expected_N).sum()), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fast_paths", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "mistral", "lfm2"])
def test_several_spans_give_the_gradients_of_a_masked_loss(
    make_model: MakeModel, make_family: MakeModel, kind: str, fast_paths: bool, loss: str
) -> None:
    language_model, batch = any_model(make_model, make_family, kind), turns()
    model = language_model.model
    weight_N = batch["weight_N"] * batch["weight_B"][batch.row_N] * batch.targets_N
    (0.01 * weight_N * plain_logprobs(model, batch)).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = float(torch.sqrt(sum(((g**2).sum() for g in expected.values()), torch.tensor(0.0))))
    model.zero_grad()
    settings = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1e9)
    learner = LocalLearner(language_model, settings, max_tokens=30, fast_paths=fast_paths)
    seen: dict[str, Tensor] = {}
    learner.optimizer.adamw.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    metrics = learner.update(batch, LOSSES[loss], count=1.0, lr=0.0)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, atol=2e-5 * largest, rtol=0)


@pytest.mark.parametrize("fast_paths", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_rewards_of_several_spans_are_read_at_the_last_token(
    make_model: MakeModel, tmp_path: Path, kind: str, fast_paths: bool
) -> None:
    """Which is a tool's in half of the rows. Scores stand where sampled tokens are predicted."""
    save(make_model(kind), tmp_path)
    language_model, batch = load_scalar(tmp_path), turns()
    torch.manual_seed(5)
    torch.nn.init.normal_(language_model.model.score.weight)
    scorer = LocalScorer(language_model, max_tokens=40, fast_paths=fast_paths)
    rewards, scores = [], []
    for number, row_T in enumerate(batch.tokens_BT):
        length = int(batch.length_B[number])
        with torch.no_grad():
            body = language_model.model.base_model
            hidden_TD = body(input_ids=row_T[None, :length]).last_hidden_state[0]
        score_T = scores_N(hidden_TD, scorer.head)
        rewards.append(score_T[-1:])
        scores.append(score_T[:-1][batch.sampled_BT[number, 1:length]])
    torch.testing.assert_close(rewards_B(scorer, batch), torch.cat(rewards), atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(scorer.scores(batch), torch.cat(scores), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2", "olmoe"])
def test_the_fast_paths_are_the_reference(
    make_model: MakeModel, make_family: MakeModel, tmp_path: Path, kind: str
) -> None:
    """The same tokens, and numbers to rounding: what a fast path changes is the order of sums."""
    save(any_model(make_model, make_family, kind), tmp_path)
    results = []
    for fast_paths in (True, False):
        backend = LocalBackend(fast_paths=fast_paths)
        learner = backend.learner(tmp_path, SETTINGS)
        (first, *_) = forward_passes(learner.model, turns(), fast_paths=fast_paths)
        assert (type(first).__name__ == "PaddedPass") != fast_paths
        sampled = backend.sampler(learner).sample(
            PROMPTS, group_size=3, max_new_tokens=12, temperature=0.8, seed=1
        )
        sampled["weight_N"] = torch.linspace(-1, 1, sampled.num_tokens)
        sampled["weight_B"] = torch.linspace(1, 2, len(sampled))
        sums = [
            learner.update(rows, LOSSES["token"], count=9.0, lr=1e-3) for rows in (sampled, turns())
        ]
        hidden_ND = backend.scorer(learner).hidden(turns())
        results.append((sampled, sums, hidden_ND))
    (fast, fast_sums, fast_ND), (plain, plain_sums, plain_ND) = results
    assert fast.responses() == plain.responses()
    torch.testing.assert_close(
        fast["sampler_logp_N"], plain["sampler_logp_N"], atol=2e-5, rtol=1e-5
    )
    for one, other in zip(fast_sums, plain_sums, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    torch.testing.assert_close(fast_ND, plain_ND, atol=2e-3, rtol=1e-3)


def test_losses_can_be_sent_to_another_process() -> None:
    for loss in LOSSES.values():
        copied = pickle.loads(pickle.dumps(loss))
        assert copied == loss and copied.function is loss.function
    heads = HeadLoss(weighted_logits, Head(weight_VD=torch.ones(2, 3)))
    assert torch.equal(pickle.loads(pickle.dumps(heads)).settings.weight_VD, torch.ones(2, 3))


def one_step(learner: LocalLearner) -> None:
    learner.update(turns(), LOSSES["token"], count=9.0, lr=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learner_s_own_sampler_and_scorer_follow_it(
    make_model: MakeModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    save(make_model(stop=STOPS), tmp_path)
    backend = LocalBackend()
    settings = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.1, max_grad_norm=1.0, dtype=dtype)
    learner = backend.learner(tmp_path, settings)
    sampler, scorer = backend.sampler(learner, dtype=dtype), backend.scorer(learner, dtype=dtype)
    assert sampler.chat is learner.chat is scorer.chat
    before_N = scorer.logprobs(turns())
    one_step(learner)
    sampler.sync(learner)
    scorer.sync(learner)
    assert not torch.equal(scorer.logprobs(turns()), before_N)
    assert torch.equal(scorer.logprobs(turns()), learner.logprobs(turns()))
    sampled = sampler.sample(PROMPTS, group_size=2, max_new_tokens=9, temperature=1.0, seed=0)
    near = 1e-5 if dtype == torch.float32 else 0.1
    logp_N = learner.logprobs(sampled)
    torch.testing.assert_close(sampled["sampler_logp_N"], logp_N, atol=near, rtol=0)
    with pytest.raises(ValueError, match="shares the weights of another learner"):
        sampler.sync(backend.learner(tmp_path, settings))


def test_a_scorer_and_a_sampler_of_their_own_take_weights_over(
    make_model: MakeModel, tmp_path: Path
) -> None:
    save(make_model(stop=STOPS), tmp_path)
    backend = LocalBackend()
    learner = backend.learner(tmp_path, SETTINGS)
    scorer, sampler = backend.scorer(tmp_path), backend.sampler(tmp_path)
    start_N = scorer.logprobs(turns())
    start = {name: value.clone() for name, value in scorer.state().items()}
    one_step(learner)
    assert torch.equal(scorer.logprobs(turns()), start_N)
    scorer.sync(learner)
    sampler.sync(learner)
    assert torch.equal(scorer.logprobs(turns()), learner.logprobs(turns()))
    sampled, theirs = (
        which.sample(PROMPTS, group_size=2, max_new_tokens=9, temperature=1.0, seed=0)
        for which in (sampler, backend.sampler(learner))
    )
    assert torch.equal(sampled["sampler_logp_N"], theirs["sampler_logp_N"])
    one_step(learner)
    assert not torch.equal(scorer.logprobs(turns()), learner.logprobs(turns())), "a copy"
    scorer.restore(start)
    assert torch.equal(scorer.logprobs(turns()), start_N)
    for reader in (scorer, sampler):
        with pytest.raises(TypeError, match="local learners; got str"):
            reader.sync("another backend's")  # type: ignore[arg-type]


@pytest.mark.parametrize("scalar", [False, True])
def test_a_learner_saves_what_it_learned(
    make_model: MakeModel, tmp_path: Path, scalar: bool
) -> None:
    save(make_model(), tmp_path / "start")
    backend = LocalBackend()
    settings = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0, ema=0.5)
    learner = backend.learner(tmp_path / "start", settings, scalar=scalar)
    assert learner.num_parameters() == sum(p.numel() for p in learner.model.parameters())
    loss = HeadLoss(squared) if scalar else LOSSES["token"]
    for _ in range(2):
        learner.update(turns(), loss, count=9.0, lr=0.01)
    newest = [p.detach().clone() for p in learner.master.parameters()]
    learner.finish()
    learner.save(tmp_path / "out")
    again = (load_scalar if scalar else load)(tmp_path / "out").model
    for saved, mean in zip(again.parameters(), learner.master.parameters(), strict=True):
        assert torch.equal(saved, mean)
    assert any(not torch.equal(p, q) for p, q in zip(again.parameters(), newest, strict=True))


def squared(_: None, hidden_ND: Tensor, head: Head, batch: Batch) -> tuple[Tensor, Metrics]:
    return (scores_N(hidden_ND, head) - 1).square().sum(), {}


def test_no_rows_give_no_numbers(make_model: MakeModel) -> None:
    scorer = LocalScorer(make_model())
    none = turns().select(torch.zeros(6, dtype=torch.bool))
    assert scorer.hidden(none).shape == (0, 32)
    assert scorer.logprobs(none).shape == rewards_B(scorer, none).shape == (0,)


def test_the_local_backend_is_one(make_model: MakeModel, tmp_path: Path) -> None:
    """mypy checks the signatures against the Protocols; this checks that there is something to
    check."""
    save(make_model(), tmp_path)
    backend: Backend = LocalBackend()
    learner: Learner = backend.learner(tmp_path, SETTINGS, scalar=False)
    sampler: Sampler = backend.sampler(learner, dtype=torch.float32)
    scorer: Scorer = backend.scorer(tmp_path, dtype=torch.float32, scalar=False)
    assert isinstance(sampler, LocalSampler)
    assert learner.chat.num_ids == scorer.chat.num_ids == 100
    assert scorer.chat.max_positions == learner.chat.max_positions is not None
