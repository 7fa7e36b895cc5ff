"""Which weights learn, their moving average, and several losses in one step.

Legend: B rows, T positions, V vocabulary, N sampled tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backends.base import AuxLoss, LearnerSettings, Metrics, TokenLoss
from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.local import LocalLearner
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]
BF16 = torch.bfloat16


def batch(seed: int = 0, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = [(3, 2), (7, 5), (1, 1), (4, 6), (5, 5), (2, 9)][:rows]
    prompts, responses = (
        [torch.randint(5, 90, (pair[i],), generator=generator).tolist() for pair in lengths]
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


def steps(mine: LocalLearner, first: int, last: int) -> None:
    for step in range(first, last):
        rollouts = batch(step)
        mine.update(rollouts, CROSS_ENTROPY, count=rollouts.num_tokens, lr=0.01)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("kind", "trainable", "learns"),
    [
        ("qwen3", ["*.mlp.*"], lambda name: ".mlp." in name),
        ("llama", ["lm_head.*", "*.1.*"], lambda name: "lm_head" in name or ".1." in name),
        # The head is the embedding: either name is that of the one tensor.
        ("qwen3", ["lm_head.weight"], lambda name: "embed_tokens" in name),
        ("gpt2", ["*.wte.weight"], lambda name: ".wte." in name),
    ],
)
def test_what_no_glob_matches_stays(
    make_model: MakeModel,
    kind: str,
    trainable: list[str],
    learns: Callable[[str], bool],
    dtype: torch.dtype,
    threads: int,
) -> None:
    language_model = make_model(kind)
    before = weights(language_model)
    with ThreadPoolExecutor(max(1, threads)) as workers:
        helpers = workers if threads else None
        mine = learner(
            language_model, trainable=trainable, dtype=dtype, workers=helpers, max_tokens=30
        )
        steps(mine, 0, 2)
    changed = {n for n, w in weights(language_model).items() if not torch.equal(w, before[n])}
    expected = {name for name in before if learns(name)}
    assert changed == expected and 0 < len(expected) < len(before)
    assert len(mine.parameters) == len(expected) == len(mine.optimizer.adamw.state)


def test_what_learns_gets_the_gradient_that_it_gets_among_all(make_model: MakeModel) -> None:
    """Without clipping and weight decay, AdamW moves every number by itself: the weights that learn
    end where they end when all do, in the first step."""
    found = []
    for trainable in (["*"], ["*.mlp.*"]):
        language_model = make_model()
        options: dict[str, Any] = {"max_grad_norm": 1e9, "weight_decay": 0.0}
        steps(learner(language_model, trainable=trainable, **options), 0, 1)
        found.append(weights(language_model))
    everything, part = found
    for name in everything:
        if ".mlp." in name:
            torch.testing.assert_close(part[name], everything[name], atol=1e-6, rtol=0)


def test_a_glob_without_a_parameter_is_refused(make_model: MakeModel) -> None:
    message = r"'model.layers.9.mlp.up_proj.weight' matches no parameter.*layers.1.mlp.up_proj"
    with pytest.raises(ConfigError, match=message):
        learner(make_model(), trainable=["*", "model.layers.9.mlp.up_proj.weight"])


def test_all_weights_learn_without_a_choice(make_model: MakeModel) -> None:
    results = []
    for options in ({}, {"trainable": ["*"]}, {"trainable": ["model.*", "lm_head.*"]}):
        language_model = make_model()
        steps(learner(language_model, **options), 0, 3)
        results.append(weights(language_model))
    for other in results[1:]:
        assert all(torch.equal(other[name], w) for name, w in results[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_average_by_hand(make_model: MakeModel, dtype: torch.dtype) -> None:
    """Decay .75, from the start w0: .75 (.75 w0 + .25 w1) + .25 w2; the newest weights learn on."""
    language_model = make_model()
    seen = [weights(language_model)]
    mine = learner(language_model, ema=0.75, dtype=dtype)
    for step in range(2):
        steps(mine, step, step + 1)
        seen.append(weights(language_model))
    plain = make_model()
    steps(learner(plain, dtype=dtype), 0, 2)
    assert all(torch.equal(w, seen[2][n]) for n, w in weights(plain).items())
    mine.finish()
    for name, found in weights(language_model).items():
        expected = 0.75 * (0.75 * seen[0][name] + 0.25 * seen[1][name]) + 0.25 * seen[2][name]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert not torch.equal(found, seen[2][name])


def test_without_an_average_the_newest_weights_are_the_result(make_model: MakeModel) -> None:
    language_model = make_model()
    mine = learner(language_model)
    steps(mine, 0, 1)
    before = weights(language_model)
    mine.finish()
    assert all(torch.equal(w, before[n]) for n, w in weights(language_model).items())
    assert not any(name.startswith("average") for name in mine.state())


def test_a_restored_average_and_frozen_weights_end_with_the_same_bits(
    make_model: MakeModel,
) -> None:
    options: dict[str, Any] = {"ema": 0.9, "trainable": ["*.mlp.*"], "dtype": BF16}
    whole = learner(make_model(), **options)
    steps(whole, 0, 4)
    stopped = learner(make_model(), **options)
    steps(stopped, 0, 2)
    state = {name: tensor.clone() for name, tensor in stopped.state().items()}
    # Of another seed: what is frozen has to come from the checkpoint too, also in the copy.
    resumed = learner(make_model(seed=9), **options)
    resumed.restore(state)
    steps(resumed, 2, 4)
    for one, other in ((whole.master, resumed.master), (whole.model, resumed.model)):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    whole.finish()
    resumed.finish()
    ours, theirs = weights(whole.language_model), weights(resumed.language_model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def gradients(language_model: LanguageModel, rollouts: Batch, count: float) -> dict[str, Tensor]:
    """By transformers itself, one padded batch of whole rows."""
    model = language_model.model
    model.zero_grad()
    logits_BTV = model(input_ids=rollouts.tokens_BT).logits[:, :-1]
    logp_BT = torch.log_softmax(logits_BTV, -1).gather(2, rollouts.tokens_BT[:, 1:, None])[..., 0]
    (-logp_BT[rollouts.sampled_BT[:, 1:]].sum() / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("threads", [0, 2])
def test_the_gradient_of_several_losses_is_their_sum(make_model: MakeModel, threads: int) -> None:
    """SGD-like check: what reaches the optimiser is g1 + .3 g2 + 2 g3, each a mean by its own
    count, and the norm that is clipped is that of the sum. In float64, with GPT-2, whose norms
    compute in the type of the weights."""
    one, two, three = batch(0), batch(1, rows=3), batch(2, rows=2)
    language_model = make_model("gpt2")
    language_model.model.double()
    counts = (float(one.num_tokens), float(two.num_tokens), 5.0)
    found = [
        gradients(language_model, rows, count)
        for rows, count in zip((one, two, three), counts, strict=True)
    ]
    expected = {n: found[0][n] + 0.3 * found[1][n] + 2.0 * found[2][n] for n in found[0]}
    norm = torch.sqrt(sum((g**2).sum() for g in expected.values()))
    language_model.model.zero_grad()
    parts = [
        AuxLoss(name="two", batch=two, loss=CROSS_ENTROPY, count=counts[1], weight=0.3),
        AuxLoss(name="three", batch=three, loss=CROSS_ENTROPY, count=5.0, weight=2.0),
    ]
    seen: dict[str, Tensor] = {}
    with ThreadPoolExecutor(2) as workers:
        mine = learner(
            language_model,
            dtype=torch.float64,
            max_tokens=20,
            max_grad_norm=0.01,
            workers=workers if threads else None,
        )
        mine.optimizer.adamw.register_step_pre_hook(
            lambda *_: seen.update(
                {n: p.grad.clone() for n, p in language_model.model.named_parameters()}
            )
        )
        metrics = mine.update(one, CROSS_ENTROPY, count=counts[0], lr=0.01, aux=parts)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-9)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient * 0.01 / norm, atol=1e-9, rtol=1e-6)
    assert set(metrics) == {
        *("loss", "rows", "grad_norm"), *(f"{p}/{m}" for p in ("two", "three") for m in
        ("loss", "rows"))
    }  # fmt: skip
    assert (metrics["rows"], metrics["two/rows"], metrics["three/rows"]) == (6, 3, 2)


def test_a_part_of_no_weight_is_measured_and_not_learned(make_model: MakeModel) -> None:
    results = []
    for weight in (None, 0.0):
        language_model, rollouts, other = make_model(), batch(), batch(1)
        part = AuxLoss(name="x", batch=other, loss=CROSS_ENTROPY, count=3.0, weight=0.0)
        aux = [] if weight is None else [part]
        metrics = learner(language_model).update(
            rollouts, CROSS_ENTROPY, count=rollouts.num_tokens, lr=0.01, aux=aux
        )
        results.append((metrics, weights(language_model)))
    (plain, alone), (metrics, beside) = results
    assert metrics["x/loss"] > 0
    assert {k: v for k, v in metrics.items() if not k.startswith("x/")} == pytest.approx(plain)
    for name in alone:
        torch.testing.assert_close(beside[name], alone[name], atol=1e-7, rtol=1e-6)


def test_a_part_keeps_blocks_of_its_rows_together(make_model: MakeModel) -> None:
    seen: list[list[int]] = []

    def paired(_: Any, logp_N: Tensor, entropy_N: Tensor, rows: Batch) -> tuple[Tensor, Metrics]:
        seen.append(rows["number_B"].tolist())
        return negative_logp(None, logp_N, entropy_N, rows)

    pairs = batch(1)
    pairs["number_B"] = torch.arange(len(pairs))
    part = AuxLoss(name="pairs", batch=pairs, loss=TokenLoss(paired), count=1.0, group_rows=2)
    mine = learner(make_model(), max_tokens=12)
    mine.update(batch(), CROSS_ENTROPY, count=1.0, lr=0.01, aux=[part])
    assert len(seen) > 1
    assert all(index[1::2] == [i + 1 for i in index[::2]] for index in seen)
