"""The learner and scorer: right positions, splitting that changes nothing, exact continuation.

Legend: B rows, T positions, N sampled tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backends.base import LearnerSettings, Metrics, TokenLoss
from posttrain.backends.checkpoint import LanguageModel, output_head
from posttrain.backends.forward import forward_passes, sampled_logprobs
from posttrain.backends.local import LocalLearner, LocalScorer
from posttrain.engine.errors import ConfigError, StageError
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]
LENGTHS = [(3, 2), (7, 5), (1, 1), (4, 6), (5, 5), (2, 9), (6, 3)]


def batch(seed: int = 0) -> Batch:
    """Seven rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = (
        [torch.randint(5, 90, (pair[i],), generator=generator).tolist() for pair in LENGTHS]
        for i in range(2)
    )
    return Batch.from_tokens(prompts, responses, pad_id=0)


def learner(language_model: LanguageModel, **options: Any) -> LocalLearner:
    settings = {"weight_decay": 0.1, "max_grad_norm": 1.0, "max_tokens": 8192} | options
    machine = {k: settings.pop(k) for k in ("max_tokens", "compile", "workers") if k in settings}
    return LocalLearner(language_model, LearnerSettings(betas=(0.9, 0.98), **settings), **machine)


def negative_logp(
    _: Any, logp_N: Tensor, entropy_N: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    return -logp_N.sum(), {"loss": -logp_N.sum().detach(), "rows": torch.tensor(len(batch))}


CROSS_ENTROPY = TokenLoss(negative_logp)


def weights(language_model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in language_model.model.named_parameters()}


@pytest.mark.parametrize("budget", [20, 10_000])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_hidden_states_predict_the_response_tokens(
    make_model: MakeModel, kind: str, budget: int
) -> None:
    """Row by row without padding, position t - 1 of the whole model's logits predicts token t."""
    language_model, rollouts = make_model(kind), batch()
    with torch.no_grad():
        hidden_ND = LocalScorer(language_model, max_tokens=budget).hidden(rollouts)
        expected = []
        for row, (start, length) in zip(rollouts.tokens_BT, LENGTHS, strict=True):
            logits_TV = language_model.model(input_ids=row[None, : start + length]).logits[0]
            expected.append(logits_TV[start - 1 : -1])
    head = LocalScorer(language_model).head
    logits_NV = torch.nn.functional.linear(hidden_ND, head.weight_VD, head.bias_V)
    torch.testing.assert_close(logits_NV, torch.cat(expected), atol=2e-5, rtol=1e-5)
    flat = [token for response in rollouts.responses() for token in response]
    assert rollouts.targets_N.tolist() == flat


def test_a_row_longer_than_the_model_is_refused(make_model: MakeModel) -> None:
    language_model = make_model(positions=11)
    with pytest.raises(ConfigError, match=r"a row of 12 tokens.* 11 positions"):
        learner(language_model).update(batch(), CROSS_ENTROPY, count=1, lr=0.01)
    learner(make_model(positions=12)).update(batch(), CROSS_ENTROPY, count=1, lr=0.01)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    make_model: MakeModel, factor: float
) -> None:
    def diverged(
        factor: float, logp_N: Tensor, entropy_N: Tensor, batch: Batch
    ) -> tuple[Tensor, Metrics]:
        return logp_N.sum() * factor, {}

    language_model = make_model()
    before = weights(language_model)
    with pytest.raises(StageError, match=r"diverged: the gradient norm is (nan|inf) at lr 0\.01"):
        learner(language_model).update(batch(), TokenLoss(diverged, factor), count=1, lr=0.01)
    after = weights(language_model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_a_shared_prompt_learns_what_padded_rows_do(make_model: MakeModel, kind: str) -> None:
    """Groups of three: gradients of all weights against one right-padded batch of whole rows, in
    float64 but for the norms, which transformers computes in float32."""
    language_model = make_model(kind)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in (6, 1, 9)]
    lengths = (3, 8, 1, 5, 5, 2, 7, 4, 6)
    responses = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]
    rollouts = Batch.from_tokens([p for p in prompts for _ in range(3)], responses, pad_id=0)
    model = language_model.model.double()
    logits_BTV = model(input_ids=rollouts.tokens_BT).logits[:, :-1]
    logp_BT = torch.log_softmax(logits_BTV, -1).gather(2, rollouts.tokens_BT[:, 1:, None])[..., 0]
    (-logp_BT[rollouts.sampled_BT[:, 1:]].sum() / 41).backward()
    padded = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (forward,) = forward_passes(model, rollouts, max_tokens=8192)
    parts = getattr(forward, "parts", (forward,))
    tokens = sum(len(part.index_M) for part in parts)
    assert tokens == 6 + 1 + 9 + sum(lengths) - len(lengths)
    rows, head = rollouts.select(forward.index_B), output_head(model, language_model.ids)
    logp_N, _ = sampled_logprobs(forward.hidden_states(model), head, rows, 1.0)
    (-logp_N.sum() / 41).backward()
    for name, parameter in model.named_parameters():
        scale = float(padded[name].abs().max())
        torch.testing.assert_close(parameter.grad, padded[name], atol=1e-6 * scale + 1e-9, rtol=0)


@pytest.mark.parametrize("max_tokens", [1, 13, 30])
def test_many_micro_batches_learn_what_one_does(make_model: MakeModel, max_tokens: int) -> None:
    """In float64, so that nothing but rounding of 1e-16 can hide a difference of the gradients; the
    norms of other families compute in float32 whatever the weights are."""
    results = []
    for budget in (10_000, max_tokens):
        language_model = make_model("gpt2")
        language_model.model.double()
        trainer = learner(language_model, max_tokens=budget, dtype=torch.float64)
        rollouts = batch()
        metrics = trainer.update(rollouts, CROSS_ENTROPY, count=rollouts.num_tokens, lr=0.01)
        results.append((metrics, weights(language_model)))
    (one, whole), (many, split) = results
    assert one == pytest.approx(many, rel=1e-12)
    assert one["rows"] == len(LENGTHS)
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_workers_change_no_bit(make_model: MakeModel, kind: str) -> None:
    """Several passes, so that there is something to add up in another order."""
    found = []
    with ThreadPoolExecutor(3) as workers:
        for helpers in (None, workers):
            language_model = make_model(kind)
            trainer = learner(language_model, max_tokens=30, workers=helpers)
            assert len(list(forward_passes(language_model.model, batch(), max_tokens=30))) > 1
            for _ in range(3):
                metrics = trainer.update(batch(), CROSS_ENTROPY, count=31.0, lr=0.01)
            found.append((metrics, weights(language_model)))
    (one, alone), (other, together) = found
    assert one == other
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_update_is_adamw_on_the_mean_loss_with_a_clipped_gradient(make_model: MakeModel) -> None:
    ours, theirs = make_model(), make_model()
    rollouts = batch()
    metrics = learner(ours, max_grad_norm=0.5).update(
        rollouts, CROSS_ENTROPY, count=rollouts.num_tokens, lr=0.01
    )
    optimizer = torch.optim.AdamW(
        theirs.model.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.1
    )
    labels_BT = rollouts.tokens_BT.masked_fill(~rollouts.sampled_BT, -100)
    loss = theirs.model(input_ids=rollouts.tokens_BT, labels=labels_BT).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), 0.5)
    optimizer.step()
    assert metrics["loss"] / rollouts.num_tokens == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.5
    for name, expected in weights(theirs).items():
        # Adam's first step is lr * sign(gradient): where that is nearly 0 the sign is rounding.
        difference = (weights(ours)[name] - expected).abs()
        assert (difference > 1e-4).float().mean() < 0.01, name


def test_learning_has_no_dropout(make_model: MakeModel) -> None:
    """GPT-2 drops a tenth of its activations in training mode; a policy must not."""
    losses = []
    for seed in (0, 1):
        language_model, rollouts = make_model("gpt2"), batch()
        language_model.model.train()
        trainer = learner(language_model)
        torch.manual_seed(seed)
        losses.append(trainer.update(rollouts, CROSS_ENTROPY, count=1, lr=1e-3)["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_a_restored_learner_goes_on_with_the_same_bits(make_model: MakeModel, kind: str) -> None:
    def steps(trainer: LocalLearner, first: int, last: int) -> None:
        for step in range(first, last):
            rollouts = batch(step)
            trainer.update(rollouts, CROSS_ENTROPY, count=rollouts.num_tokens, lr=0.01)

    whole = make_model(kind)
    steps(learner(whole), 0, 5)

    stopped = make_model(kind)
    first_half = learner(stopped)
    steps(first_half, 0, 2)
    state = {name: tensor.clone() for name, tensor in first_half.state().items()}
    steps(first_half, 2, 3)

    resumed = make_model(kind, seed=9)
    second_half = learner(resumed)
    second_half.restore(state)
    steps(second_half, 2, 5)
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected), name


def test_a_restored_state_is_a_copy(make_model: MakeModel) -> None:
    language_model, rollouts = make_model(), batch()
    trainer = learner(language_model)
    trainer.update(rollouts, CROSS_ENTROPY, count=1, lr=0.01)
    state = {name: tensor.clone() for name, tensor in trainer.state().items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    trainer.restore(state)
    trainer.update(rollouts, CROSS_ENTROPY, count=1, lr=0.01)
    for name in kept:
        assert torch.equal(state[name], kept[name]), name


@pytest.mark.parametrize("max_tokens", [1, 13, 10_000])
def test_the_scorer_answers_in_the_order_of_the_rows(
    make_model: MakeModel, max_tokens: int
) -> None:
    language_model, rollouts = make_model(), batch()
    scorer = LocalScorer(language_model, max_tokens=max_tokens)
    hidden_ND = scorer.hidden(rollouts)
    alone = [scorer.hidden(rollouts.select(torch.tensor([n]))) for n in range(len(rollouts))]
    expected = torch.cat(alone)
    torch.testing.assert_close(hidden_ND, expected, atol=1e-5, rtol=1e-5)
    assert not hidden_ND.requires_grad


def test_logprobs_of_the_learner_are_those_of_its_weights(make_model: MakeModel) -> None:
    language_model, rollouts = make_model(), batch()
    trainer = learner(language_model, max_tokens=13)
    before = trainer.logprobs(rollouts, temperature=0.7)
    scorer = LocalScorer(language_model)
    expected = scorer.logprobs(rollouts, temperature=0.7)
    torch.testing.assert_close(before, expected, atol=1e-5, rtol=1e-5)
    assert not before.requires_grad
    trainer.update(rollouts, CROSS_ENTROPY, count=rollouts.num_tokens, lr=0.01)
    assert trainer.logprobs(rollouts, temperature=0.7).mean() > before.mean()
