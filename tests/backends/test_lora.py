"""Adapters: peft's own numbers, one base for many models, and bits that stay.

Legend: N sampled tokens, F outputs, D inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backends import lora
from posttrain.backends.base import LearnerSettings, LoraSettings, Metrics, TokenLoss
from posttrain.backends.checkpoint import LanguageModel, load, save
from posttrain.backends.local import LocalBackend, LocalLearner, LocalScorer
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch

peft = pytest.importorskip("peft")

MakeModel = Callable[..., LanguageModel]
BF16 = torch.bfloat16
VARIANTS = {
    "plain": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "few": {"targets": ("q_proj", "down_proj")},
}


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = (
        [torch.randint(5, 25, (n,), generator=generator).tolist() for n in lengths]
        for lengths in ((3, 7, 1, 4), (2, 5, 1, 6))
    )
    return Batch.from_tokens(prompts, responses, pad_id=0)


def negative_logp(
    _: Any, logp_N: Tensor, entropy_N: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    return -logp_N.sum(), {"loss": -logp_N.sum().detach()}


CROSS_ENTROPY = TokenLoss(negative_logp)


def settings(**how: Any) -> LearnerSettings:
    kept = {key: how.pop(key) for key in ("dtype", "ema", "save_dtype") if key in how}
    return LearnerSettings(
        betas=(0.9, 0.98),
        weight_decay=0.0,
        max_grad_norm=1.0,
        lora=LoraSettings(**{"rank": 4, "alpha": 8.0, "seed": 3} | how),
        **kept,
    )


def train(learner: LocalLearner, first: int = 0, last: int = 3) -> list[dict[str, float]]:
    found = []
    for step in range(first, last):
        rows = batch(step)
        found.append(learner.update(rows, CROSS_ENTROPY, count=rows.num_tokens, lr=0.01))
    return found


@pytest.fixture
def base(make_model: MakeModel, tmp_path: Path) -> Path:
    save(make_model("qwen3"), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return trained(base, tmp_path / "adapter")


def trained(base: Path, out: Path, **how: Any) -> Path:
    learner = LocalBackend().learner(base, settings(**how))
    train(learner)
    learner.save(out)
    return out


def theirs(base: Path, adapter: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_an_adapter_that_peft_reads_and_merges_to_the_same_numbers(
    base: Path, tmp_path: Path, variant: str
) -> None:
    learner = LocalBackend().learner(base, settings(**VARIANTS[variant]))
    before = logits(learner.model)
    train(learner)
    learner.save(tmp_path / "adapter")
    model = theirs(base, tmp_path / "adapter")
    mine = logits(learner.model)
    assert float((mine - before).abs().max()) > 0.01
    torch.testing.assert_close(logits(model), mine, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(load(tmp_path / "adapter").model), mine, atol=1e-4, rtol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), mine, atol=1e-4, rtol=1e-4)
    for name, weight in lora.merged_parameters(learner.model):
        torch.testing.assert_close(weight, merged.get_parameter(name).data)


def test_a_fresh_adapter_changes_nothing_and_its_gradients_are_those_of_peft(base: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    learner = LocalBackend().learner(base, settings())
    other = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(logits(learner.model), logits(other), atol=0, rtol=0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    other = get_peft_model(other, config)
    own = lora.own_parameters(learner.model)
    with torch.no_grad():
        for name, parameter in own.items():
            # Away from 0, so that both matrices have a gradient.
            parameter.add_(0.02)
            other.base_model.model.get_parameter(name).copy_(parameter)
    prompt, response = [5, 6, 7], [8, 9, 10, 11]
    rows = Batch.from_tokens([prompt], [response], pad_id=0)
    learner.accumulate(rows, CROSS_ENTROPY, count=4)
    tokens = torch.tensor([prompt + response])
    labels = torch.tensor([[-100] * 3 + response])
    other(input_ids=tokens, labels=labels).loss.backward()
    for name, parameter in own.items():
        gradient = other.base_model.model.get_parameter(name).grad
        assert parameter.grad is not None and gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_sampling_has_the_adapter_in_the_weights_and_leaves_the_base_as_it_was(
    make_model: MakeModel, tmp_path: Path, kind: str
) -> None:
    save(make_model(kind), tmp_path / "base")
    backend = LocalBackend()
    learner = backend.learner(tmp_path / "base", settings())
    sampler = backend.sampler(learner)
    train(learner)
    learner.save(tmp_path / "adapter")
    below = learner.policy.below.language_model.model
    before = {name: p.clone() for name, p in below.named_parameters()}
    how = {"group_size": 3, "max_new_tokens": 8, "temperature": 1.0, "seed": 0}
    prompts = [[5, 6, 7], [8, 9]]
    mine = sampler.sample(prompts, **how)
    for name, parameter in below.named_parameters():
        assert torch.equal(parameter, before[name]), name
    other = LocalBackend().sampler(tmp_path / "adapter").sample(prompts, **how)
    assert torch.equal(mine.tokens_BT, other.tokens_BT)
    torch.testing.assert_close(
        mine["sampler_logp_N"], other["sampler_logp_N"], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(mine["sampler_logp_N"], learner.logprobs(mine), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_many_specialists_have_one_base_in_memory_and_the_numbers_of_merged_weights(
    base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    backend = LocalBackend()
    learner = backend.learner(base, settings(dtype=dtype))
    places = [trained(base, tmp_path / str(seed), seed=seed) for seed in range(3)]
    scorers = [backend.scorer(place, dtype=dtype) for place in places]
    reference = backend.scorer(base, dtype=dtype)
    whole = dict(reference.model.named_parameters())
    for model in (learner.model, *(scorer.model for scorer in scorers)):
        own = lora.own_parameters(model)
        rest = {n: p for n, p in model.named_parameters() if n not in own}
        assert own and rest
        for name, parameter in rest.items():
            assert parameter is whole[name.replace(".base_layer.", ".")]
            assert not parameter.requires_grad
    learned = {id(p) for group in learner.optimizer.adamw.param_groups for p in group["params"]}
    for scorer in (reference, *scorers):
        for parameter in scorer.model.parameters():
            assert not parameter.requires_grad
            assert id(parameter) not in learned
    rows = batch()
    for place, scorer in zip(places, scorers, strict=True):
        merged = LocalScorer(load(place, dtype=dtype))
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(
            scorer.logprobs(rows), merged.logprobs(rows), atol=tolerance, rtol=tolerance
        )
    assert not torch.allclose(scorers[0].logprobs(rows), reference.logprobs(rows), atol=1e-3)


def test_in_bfloat16_the_base_is_held_once_and_the_adapter_learns_in_float32(
    base: Path, tmp_path: Path
) -> None:
    learner = LocalBackend().learner(base, settings(dtype=BF16))
    assert {p.dtype for p in learner.model.parameters()} == {BF16}
    assert {p.dtype for p in learner.parameters} == {torch.float32}
    assert set(learner.optimizer.adamw.param_groups[0]["params"]) == set(learner.parameters)
    losses = [step["loss"] for step in (train(learner, 0, 1) * 2)]
    assert losses[0] > 0
    learner.save(tmp_path / "adapter")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    for copy, master in zip(learner.copies, learner.parameters, strict=True):
        assert torch.equal(copy, master.to(BF16))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_learner_that_was_put_back_goes_on_with_the_same_bits(
    base: Path, dtype: torch.dtype
) -> None:
    whole = LocalBackend().learner(base, settings(dtype=dtype, ema=0.9))
    train(whole, 0, 4)
    first = LocalBackend().learner(base, settings(dtype=dtype, ema=0.9))
    train(first, 0, 2)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    assert not any("base_layer" in name or "norm" in name for name in state)
    second = LocalBackend().learner(base, settings(dtype=dtype, ema=0.9))
    second.restore(state)
    train(second, 2, 4)
    for mine, other in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(mine, other)
    whole.finish()
    second.finish()
    for mine, other in zip(whole.copies, second.copies, strict=True):
        assert torch.equal(mine, other)


def test_training_goes_on_with_the_adapter_of_the_start(base: Path, adapter: Path) -> None:
    learner = LocalBackend().learner(adapter, settings())
    before = logits(load(adapter).model)
    torch.testing.assert_close(logits(learner.model), before, atol=1e-4, rtol=1e-4)
    train(learner)
    learner.save(adapter.parent / "more")
    config = theirs(base, adapter.parent / "more").peft_config["default"]
    assert Path(config.base_model_name_or_path) == base
    with pytest.raises(ConfigError, match=r"lora.rank = 8 and the start's adapter has 4"):
        LocalBackend().learner(adapter, settings(rank=8))
    with pytest.raises(ConfigError, match=r"lora.targets"):
        LocalBackend().learner(adapter, settings(targets=("q_proj",)))


def test_without_lora_the_merged_weights_of_an_adapter_learn(adapter: Path, tmp_path: Path) -> None:
    whole = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0)
    learner = LocalBackend().learner(adapter, whole)
    torch.testing.assert_close(logits(learner.model), logits(load(adapter).model))
    learner.save(tmp_path / "whole")
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    load(tmp_path / "whole")


def test_a_reference_follows_a_policy_with_an_adapter(base: Path) -> None:
    backend = LocalBackend()
    learner = backend.learner(base, settings())
    reference = backend.scorer(base)
    rows = batch()
    first = reference.logprobs(rows)
    train(learner)
    torch.testing.assert_close(reference.logprobs(rows), first, atol=0, rtol=0)
    reference.sync(learner)
    torch.testing.assert_close(
        reference.logprobs(rows), learner.logprobs(rows), atol=1e-4, rtol=1e-4
    )
    other = backend.scorer(base)
    other.restore(reference.state())
    assert torch.equal(other.logprobs(rows), reference.logprobs(rows))
    torch.testing.assert_close(backend.scorer(base).logprobs(rows), first, atol=0, rtol=0)
    sampler = backend.sampler(base)
    sampler.sync(learner)
    torch.testing.assert_close(logits(sampler.model), logits(reference.model), atol=0, rtol=0)


def test_a_reward_model_with_an_adapter_keeps_its_score(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from posttrain.backends.scalar import load_scalar, rewards_B

    learner = LocalBackend().learner(base, settings(), scalar=True)
    assert any(name.endswith("score/weight") for name, _ in learner.master.named_parameters())
    with torch.no_grad():
        for parameter in learner.parameters:
            parameter.add_(0.01)
    rows = batch()
    mine = rewards_B(LocalBackend().scorer(learner), rows)
    assert float(mine.abs().max()) > 0
    learner.save(tmp_path / "rm")
    backend = LocalBackend()
    torch.testing.assert_close(
        rewards_B(backend.scorer(tmp_path / "rm", scalar=True), rows), mine, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        rewards_B(LocalScorer(load_scalar(tmp_path / "rm")), rows), mine, atol=1e-4, rtol=1e-4
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(model, tmp_path / "rm")
    ours = load_scalar(tmp_path / "rm").model
    torch.testing.assert_close(
        model.base_model.model.score.weight, ours.score.weight, atol=0, rtol=0
    )
    with pytest.raises(ConfigError, match="adapter of a reward model"):
        load(tmp_path / "rm")


def test_adapters_with_more_than_low_rank_layers_are_merged_as_peft_does(
    base: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["o_proj"],
        rank_pattern={"q_proj": 3},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    other = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    other.save_pretrained(tmp_path / "theirs")
    load(base).tokenizer.save_pretrained(tmp_path / "theirs")
    expected = logits(other)
    torch.testing.assert_close(
        logits(load(tmp_path / "theirs").model), expected, atol=1e-4, rtol=1e-4
    )
    scorer = LocalBackend().scorer(tmp_path / "theirs")
    torch.testing.assert_close(logits(scorer.model), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="cannot go on as one"):
        LocalBackend().learner(tmp_path / "theirs", settings())


def test_targets_that_no_layer_has_are_told(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.targets: 'q_prj'.*did you mean 'q_proj'"):
        LocalBackend().learner(base, settings(targets=("q_prj",)))
    with pytest.raises(ConfigError, match="'lm_head' is the output layer"):
        LocalBackend().learner(base, settings(targets=("lm_head",)))


def test_a_shared_base_rests_when_all_who_read_it_do(base: Path, tmp_path: Path) -> None:
    places = [trained(base, tmp_path / str(seed), seed=seed) for seed in range(2)]
    backend, rows = LocalBackend(), batch()
    scorers = [backend.scorer(place) for place in places]
    before = [scorer.logprobs(rows) for scorer in scorers]
    held = scorers[0].language_model.below
    scorers[0].rest()
    assert held.weights.awake
    scorers[1].rest()
    assert not held.weights.awake
    head = scorers[0].head_at_rest
    # One that comes later finds the base awake, and it rests no more without that one.
    late = backend.scorer(base)
    assert late.language_model.below is held and held.weights.awake
    for scorer, expected in zip(scorers, before, strict=True):
        assert torch.equal(scorer.logprobs(rows), expected)
    assert torch.equal(head.open().weight_VD, scorers[0].head.weight_VD)
    scorers[0].rest()
    scorers[1].rest()
    assert held.weights.awake
    late.rest()
    assert not held.weights.awake
    learner = backend.learner(base, settings())
    for scorer in (*scorers, late):
        scorer.rest()
    assert held.weights.awake and learner.policy.below is held
    assert torch.equal(scorers[0].logprobs(rows), before[0])


@pytest.mark.parametrize("learner_first", [True, False])
def test_the_budget_counts_the_base_once(base: Path, learner_first: bool) -> None:
    backend = LocalBackend()
    make: list[Callable[[], Any]] = [
        lambda: backend.learner(base, settings()),
        lambda: backend.scorer(base, dtype=torch.float32),
    ]
    models = [one() for one in (make if learner_first else reversed(make))]
    told = [p.what for p in backend.parts if p.what.startswith(("frozen", "weights of"))]
    assert len(models) == 2 and told == ["frozen weights in float32"]
