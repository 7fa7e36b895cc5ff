"""The fast paths against the general ones: fused decode steps, and forward passes over flat rows.

Legend: P prompts, L rows, D hidden, N sampled tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.cpu.cache import Cache
from posttrain.backends.cpu.flat import FlatPass
from posttrain.backends.cpu.fused import FusedDecoder, is_fusable
from posttrain.backends.cpu.packing import flat_passes, packed_passes
from posttrain.backends.local import LocalSampler, LocalScorer
from posttrain.backends.padded import padded_passes
from posttrain.backends.tiny import character_tokenizer
from posttrain.rl.batch import Batch, ragged_index

MakeModel = Callable[..., LanguageModel]
SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
YARN |= {"original_max_position_embeddings": 32}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama, biases": LlamaConfig(attention_bias=True, mlp_bias=True, **SHAPE),
    "llama, yarn": LlamaConfig(rope_parameters=YARN, **SHAPE),
    "mistral, one head": MistralConfig(
        sliding_window=None, **(SHAPE | {"num_attention_heads": 1, "num_key_value_heads": 1})
    ),
    "qwen2, tied": Qwen2Config(tie_word_embeddings=True, **SHAPE),
    "qwen3": Qwen3Config(head_dim=16, **SHAPE),
    "qwen3, biases": Qwen3Config(head_dim=8, attention_bias=True, **SHAPE),
}
PROMPTS = [[11, 12, 13], [20, 21, 22, 23, 24, 25, 26], [30], [40, 41, 42, 43, 44, 45]]


def build(config: PretrainedConfig) -> LanguageModel:
    """Norm weights and biases far from their initial ones and zeros, or none would be missed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig(eos_token_id=list(range(0, 100, 7)), pad_token_id=0)
    return LanguageModel(model=model, tokenizer=character_tokenizer([]))


@pytest.fixture(params=CONFIGS)
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(CONFIGS[request.param])


def test_other_families_take_the_general_path() -> None:
    assert all(is_fusable(build(config).model) for config in CONFIGS.values())
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    others = [
        Phi3Config(num_attention_heads=2, pad_token_id=0, **shape),
        LlamaConfig(hidden_act="gelu", num_attention_heads=2, **shape),
        LlamaConfig(
            num_attention_heads=2,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            **shape,
        ),
    ]
    assert not any(is_fusable(build(config).model) for config in others)


@torch.no_grad()
def test_every_step_is_that_of_the_model(language_model: LanguageModel) -> None:
    """Six steps with rows of unequal length, one move and one late prompt; each hidden state is
    what the model's own forward pass over that row alone gives."""
    generator = torch.Generator().manual_seed(1)
    body = language_model.model.base_model

    def check(hidden_LD: Tensor, rows: list[list[int]]) -> None:
        alone = [body(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        theirs_LD = torch.stack(alone)
        scale = float(theirs_LD.abs().max())
        torch.testing.assert_close(hidden_LD, theirs_LD, atol=1e-5 * scale, rtol=0)

    decoder = FusedDecoder(language_model.model, num_slots=6, num_positions=24)
    prompts_PT = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    hidden_PD = decoder.prefill(prompts_PT, torch.tensor([4, 2]), first=0, copies=2)
    check(hidden_PD, [[5, 6, 7, 8], [9, 10]])
    rows = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 10], [9, 10]]
    for step in range(6):
        if step == 3:
            decoder.move(torch.tensor([3]), torch.tensor([1]))
            late_PD = decoder.prefill(torch.tensor([[3]]), torch.tensor([1]), first=3, copies=1)
            check(late_PD, [[3]])
            rows = [rows[0], rows[3], rows[2], [3]]
        length_L = torch.tensor([len(row) for row in rows])
        token_L = torch.randint(1, 99, (len(rows),), generator=generator)
        hidden_LD = decoder.step(token_L, length_L)
        rows = [[*row, token] for row, token in zip(rows, token_L.tolist(), strict=True)]
        check(hidden_LD, rows)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "llama, biases", "qwen2, tied", "qwen3"])
def test_bfloat16_strays_from_float32_as_the_model_does(kind: str) -> None:
    """Seventy steps, over two new layouts of the cache, with a move between. Against the same
    weights in float32 the root mean square error stays below 1.5 times that of the model's own
    bfloat16 forward pass, and below 2 % of the largest number."""
    rounded = build(CONFIGS[kind]).model.to(torch.bfloat16)
    exact = copy.deepcopy(rounded).float()
    generator = torch.Generator().manual_seed(1)
    decoder = FusedDecoder(rounded, num_slots=4, num_positions=80)
    prompts_PT = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    decoder.prefill(prompts_PT, torch.tensor([4, 2]), first=0, copies=2)
    rows = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 10], [9, 10]]
    positions, errors = set(), {"ours": [], "theirs": []}
    for step in range(70):
        if step == 40:
            decoder.move(torch.tensor([3]), torch.tensor([0]))
            rows = [rows[3], rows[1], rows[2]]
        token_L = torch.randint(1, 99, (len(rows),), generator=generator)
        ours_LD = decoder.step(token_L, torch.tensor([len(row) for row in rows]))
        rows = [[*row, token] for row, token in zip(rows, token_L.tolist(), strict=True)]
        positions.add(decoder.cache.positions)
        if step % 12 == 0:
            exact_LD, theirs_LD = (
                torch.stack(
                    [
                        model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
                        for row in rows
                    ]
                )
                for model in (exact, rounded)
            )
            scale = float(exact_LD.abs().max())
            for name, hidden_LD in (("ours", ours_LD), ("theirs", theirs_LD)):
                assert hidden_LD.dtype == torch.bfloat16
                errors[name].append((hidden_LD.float() - exact_LD) / scale)
    size = {name: float(torch.cat(found).square().mean().sqrt()) for name, found in errors.items()}
    assert 0 < size["ours"] < 1.5 * size["theirs"] and size["ours"] < 0.02
    if decoder.dense:
        assert positions == {32, 64, 96}, "as many as there is use for, and a few"


def test_a_cache_that_follows_closely_keeps_what_it_has() -> None:
    shape = (3, 2, 4, 2, 96, 8)
    cache = Cache(shape, torch.zeros(1), closely=True)
    memory = cache.memory
    assert cache.positions == 32
    written = torch.randn(3, 2, 4, 2, 32, 8)
    cache.tensor[:] = written
    for positions, expected in ((33, 64), (64, 64), (70, 96)):
        grew = cache.positions < expected
        assert cache.reach(positions) == grew and cache.positions == expected
        assert cache.tensor.is_contiguous() and torch.equal(cache.tensor[..., :32, :], written)
        assert not cache.tensor[..., 32:, :].any(), "nothing that was elsewhere before"
    assert cache.memory is memory
    assert cache.take_over((3, 2, 8, 2, 160, 8)) and cache.memory is memory
    assert cache.tensor.shape == (3, 2, 8, 2, 32, 8)
    # Twice what there was: the memory is another one, the contents are the same.
    cache.tensor[:] = 1
    assert cache.reach(65) and cache.memory is not memory
    assert bool((cache.tensor[..., :32, :] == 1).all()) and not cache.tensor[..., 32:, :].any()
    assert not cache.take_over((3, 2, 8, 2, 160, 16)), "of another model"


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_slots_in_bfloat16_are_filled_again(kind: str) -> None:
    """Rows that wait, late prompts and a second call: every row is whole, and its log-probs are
    those of the learner's forward pass to the rounding of bfloat16."""
    language_model = build(CONFIGS[kind])
    language_model.model.to(torch.bfloat16)
    # Few ends, for long rows.
    language_model.model.generation_config.eos_token_id = [7, 70]
    sampler = LocalSampler(language_model, max_rows=4)
    settings: dict[str, Any] = {"group_size": 3, "temperature": 1.0, "max_new_tokens": 60}
    first = sampler.sample(PROMPTS, seed=3, **settings)
    again = sampler.sample(PROMPTS, seed=3, **settings)
    assert again.responses() == first.responses(), "whatever the call before left in the cache"
    assert torch.equal(again["sampler_logp_N"], first["sampler_logp_N"])
    assert int(first.length_B.max()) > 32, "more than one layout of the cache"
    read_N = LocalScorer(language_model).logprobs(first)
    difference_N = first["sampler_logp_N"] - read_N
    assert float(difference_N.abs().mean()) < 0.05


def test_the_cache_of_an_earlier_call_is_used_again_and_forgotten() -> None:
    language_model = build(CONFIGS["qwen3"])
    settings: dict[str, Any] = {"group_size": 2, "temperature": 1.0, "seed": 3}
    fresh = LocalSampler(language_model).sample(PROMPTS, max_new_tokens=9, **settings)
    sampler = LocalSampler(language_model)
    sampler.sample([[50] * 30] * 5, max_new_tokens=40, **settings)
    cache = sampler.decoders.cache
    again = sampler.sample(PROMPTS, max_new_tokens=9, **settings)
    assert sampler.decoders.cache is cache
    assert again.responses() == fresh.responses()
    torch.testing.assert_close(again["sampler_logp_N"], fresh["sampler_logp_N"], atol=1e-6, rtol=0)
    sampler.sample([[50] * 60] * 5, max_new_tokens=60, **settings)
    assert sampler.decoders.cache is not cache


def groups() -> Batch:
    """Groups of three with prompts of several lengths, and one response of one token."""
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 8, 1, 5, 5, 2, 7, 4, 6, 20, 21, 1)
    responses = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]
    return Batch.from_tokens([p for p in PROMPTS for _ in range(3)], responses, pad_id=0)


@pytest.mark.parametrize("max_tokens", [1, 40, 8192])
def turns() -> Batch:
    """Rows with several sampled spans, text between and after them; pairs share a prompt."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for prompt in PROMPTS:
        for lengths in ((3, 4, 2), (1, 9, 1, 2, 5, 3)):
            ids = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]
            spans = [(part, number % 2 == 0) for number, part in enumerate(ids)]
            rows.append([(prompt, False), *spans])
    return Batch.from_spans(rows, pad_id=0)


BATCHES = {
    "groups": groups,
    "turns": turns,
    "ends": lambda: groups().with_end_position(),
}


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("max_tokens", [1, 40, 8192])
def test_every_way_through_the_model_gives_the_same(
    language_model: LanguageModel, max_tokens: int, rows: str
) -> None:
    """Hidden states and the gradients of all weights of padded rows, bins and flat rows, in float64
    but for the norms."""
    model, batch = language_model.model.double(), BATCHES[rows]()
    sizes = {"max_tokens": max_tokens, "hidden_size": model.config.hidden_size}
    ways: list[list[Any]] = [
        list(padded_passes(batch, max_tokens=max_tokens, group_rows=1)),
        list(packed_passes(batch, **sizes)),
        [FlatPass(parts=parts) for parts in flat_passes(batch, **sizes)],
    ]
    weight_N = torch.linspace(-1, 1, batch.num_tokens, dtype=torch.float64)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for passes in ways:
        model.zero_grad()
        hidden_ND = torch.zeros(batch.num_tokens, 32, dtype=torch.float64)
        for forward in passes:
            part_ND = forward.hidden_states(model)
            index_N = ragged_index(batch.sampled_len_B, forward.index_B)
            (part_ND.pow(3).sum(1) * weight_N[index_N]).sum().backward()
            hidden_ND[index_N] = part_ND.detach()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((hidden_ND, {name: grad.clone() for name, grad in gradients.items()}))
    theirs, expected = found[0]
    for ours, mine in found[1:]:
        torch.testing.assert_close(ours, theirs, atol=1e-6 * float(theirs.abs().max()), rtol=0)
        assert mine.keys() == expected.keys() and len(mine) > 3
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(mine[name], gradient, atol=2e-6 * scale + 1e-9, rtol=0)
