"""Memory of sampling: the budget, the rows that fit into it, and a cache that grows."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain.backends import forward, memory
from posttrain.backends.budget import PROCESS, cache_bytes, laid_out_bytes, shape_of
from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.cpu import cache, fused
from posttrain.backends.local import LocalSampler, LocalScorer
from posttrain.backends.memory import (
    MEMORY,
    Budget,
    given_memory,
    is_out_of_memory,
    model_shape,
    rows_at_once,
    wanted,
)
from posttrain.backends.token_sampling import FIRST_COLUMNS
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]
PROMPTS = [[11, 12, 13], [20, 21, 22, 23, 24, 25, 26], [30], [40, 41, 42, 43, 44, 45], [50, 51]]
STOPS = [4, 9]


def sample(sampler: LocalSampler, **more: Any) -> Batch:
    how = {"group_size": 3, "max_new_tokens": 100, "temperature": 1.0, "seed": 3}
    return sampler.sample(PROMPTS, **(how | more))


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("500M", 500 * 2**20), ("1.5 GiB", 3 * 2**29), ("2gb", 2**31), ("", None)],
)
def test_the_variable_is_a_number_of_bytes(text: str, size: int | None) -> None:
    assert given_memory({MEMORY: text}) == size


@pytest.mark.parametrize("text", ["much", "0", "-1G", "1X", "1e9", "9" * 400])
def test_another_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"{MEMORY} = .* is no number of bytes; .* 500M"):
        given_memory({MEMORY: text})


def test_without_it_the_budget_is_a_share_of_what_may_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv(MEMORY, raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (400 * 2**20, 2**40))
    budget = Budget(cpu)
    assert (budget.total, caches(budget)) == (300 * 2**20, 100 * 2**20)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert 2**20 < caches(budget) < budget.total < memory.machine_memory()


def test_sampling_has_what_models_leave_of_a_given_number(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MEMORY, "800M")
    budget, size = Budget(torch.device("cpu")), 800 * 2**20
    model = make_model(stop=STOPS, positions=128)
    laid_out = laid_out_bytes(model_shape(model.model))
    numbers = sum(parameter.numel() for parameter in model.model.parameters())
    assert budget.total == size and 4 * numbers < laid_out <= 8 * numbers
    assert caches(budget, model) == size - PROCESS - laid_out
    sampler = LocalSampler(model, budget=budget)
    assert caches(budget, model) == size - PROCESS - laid_out - 4 * numbers
    sample(sampler)
    assert {part.what for part in budget.parts} == {
        "weights of the sampler",
        "weights laid out for sampling",
        "keys and values of 15 rows",
        "logits of 15 rows",
    }
    # What a model takes is given back with it.
    del sampler
    assert caches(budget, model) == size - PROCESS - laid_out
    monkeypatch.setenv(MEMORY, "7M")
    assert caches(Budget(torch.device("cpu")), model) == 7 * 2**20 // 8


def caches(budget: Budget, language_model: LanguageModel | None = None) -> int:
    """What a sampler of this model may have, or of any where the model does not matter."""
    other = {"hidden_size": 8, "num_hidden_layers": 1}
    shape = shape_of(other) if language_model is None else model_shape(language_model.model)
    return budget.for_sampling(shape, "float32")


def test_rows_follow_from_what_one_may_take(make_model: MakeModel) -> None:
    """qwen3: 2 layers, 2 key-value heads of 8 numbers, keys and values, 4 bytes."""
    model = make_model(vocabulary=100).model
    assert cache_bytes(model_shape(model), 64) == 2 * 2 * 2 * 8 * 4 * 64
    row = 1.5 * 2 * 2 * 2 * 8 * 4 * 64 + 24 * 100
    assert rows_at_once(model, 64, int(10 * row)) == 10
    assert rows_at_once(model, 64, int(10 * row) - 1) == 9
    assert rows_at_once(model, 64, 1) == 1


@pytest.mark.parametrize("fast_paths", [True, False])
def test_little_memory_changes_no_response(make_model: MakeModel, fast_paths: bool) -> None:
    model = make_model(stop=STOPS, positions=128)
    plenty = sample(LocalSampler(model, fast_paths=fast_paths))
    sampler = LocalSampler(model, memory=200_000, fast_paths=fast_paths)
    little = sample(sampler)
    assert rows_at_once(model.model, 107, 200_000) < len(plenty) == 15
    assert little.responses() == plenty.responses()
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(little["sampler_logp_N"], plenty["sampler_logp_N"], **close)
    if fast_paths:
        assert sampler.decoders.cache is not None
        assert sampler.decoders.cache.shape[2] < 15


def test_a_growing_cache_changes_no_bit(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(stop=STOPS, positions=128)
    whole = sample(LocalSampler(model))
    # Of 112 positions, as many as prompts of 7 and responses of 100 need, first 16.
    monkeypatch.setattr(cache, "AT_ONCE", 1)
    sampler = LocalSampler(model)
    growing = sample(sampler)
    assert growing.responses() == whole.responses()
    assert torch.equal(growing["sampler_logp_N"], whole["sampler_logp_N"])
    longest = int(growing.length_B.max())
    assert sampler.decoders.cache is not None
    assert longest > 32 and sampler.decoders.cache.positions >= longest - 1
    # The next call goes on with what there is.
    grown = sampler.decoders.cache.tensor
    assert sample(sampler).responses() == whole.responses()
    assert sampler.decoders.cache.tensor is grown


def test_prompts_that_are_read_in_parts(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(stop=STOPS, positions=128)
    whole = sample(LocalSampler(model))
    # 7 positions, feed-forward layers of 64 numbers, 4 bytes: two prompts at a time.
    monkeypatch.setattr(fused, "READ_BYTES", 2 * 7 * 64 * 4)
    read: list[int] = []
    forward_of = type(model.model.model).forward

    def noted(body: Any, *args: Any, **more: Any) -> Any:
        read.append(len(more["input_ids"]))
        return forward_of(body, *args, **more)

    monkeypatch.setattr(type(model.model.model), "forward", noted)
    parts = sample(LocalSampler(model))
    assert read == [2, 2, 1]
    assert parts.responses() == whole.responses()
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(parts["sampler_logp_N"], whole["sampler_logp_N"], **close)


def test_short_responses_take_little(make_model: MakeModel) -> None:
    """128 rows that could have 8,000 tokens and have few: 2 MB per row at full length."""
    model = make_model(stop=list(range(4, 60)), positions=8192)
    sampler = LocalSampler(model, memory=2**40)
    how = {"group_size": 128, "max_new_tokens": 8000, "temperature": 1.0, "seed": 3}
    batch = sampler.sample([[11, 12, 13]], **how)
    assert len(batch) == 128 and bool(batch["finished_B"].all())
    assert sampler.decoders.cache is not None
    assert sampler.decoders.cache.tensor.numel() * 4 <= cache.AT_ONCE
    assert cache_bytes(model_shape(model.model), 8003) * 128 > 3 * cache.AT_ONCE


def test_a_response_longer_than_the_first_columns(make_model: MakeModel) -> None:
    """What is kept of a response grows as well, the nucleus of its tokens included."""
    model = make_model(stop=[], positions=1024)
    count = 2 * FIRST_COLUMNS + 10
    how = {"group_size": 1, "max_new_tokens": count, "temperature": 1.0, "seed": 3, "top_p": 0.5}
    sampler = LocalSampler(model)
    sampler.chat.stop_ids = ()
    batch = sampler.sample([[11, 12, 13]], **how)
    assert batch.num_tokens == count
    first, each = torch.unique_consecutive(
        torch.repeat_interleave(torch.arange(count), batch["nucleus_count_N"]), return_counts=True
    )
    assert torch.equal(each, batch["nucleus_count_N"]) and len(first) == count
    # Every token is one of its own nucleus.
    nuclei = batch["nucleus_ids_F"].split(batch["nucleus_count_N"].tolist())
    drawn = batch.targets_N.tolist()
    assert all(token in nucleus for token, nucleus in zip(drawn, nuclei, strict=True))
    alone = LocalScorer(model).logprobs(batch)
    torch.testing.assert_close(batch["sampler_logp_N"], alone, atol=1e-4, rtol=0)


def test_rows_are_read_in_portions(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(stop=STOPS, positions=128)
    batch, scorer = sample(LocalSampler(model)), LocalScorer(model)
    whole = scorer.logprobs(batch)
    # 32 numbers of 4 bytes for each token: 40 of them at once.
    monkeypatch.setattr(forward, "HIDDEN_BYTES", 40 * 32 * 4)
    portions = list(forward.hidden_portions(batch, scorer.head))
    assert len(portions) > 2 and sum(map(len, portions)) == len(batch)
    assert all(len(part) == 1 or part.num_tokens <= 40 for part in portions)
    torch.testing.assert_close(scorer.logprobs(batch), whole, atol=1e-5, rtol=0)


def test_errors_that_say_that_there_was_no_memory() -> None:
    cpu = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8623489024 bytes. Error code 12 (Cannot allocate memory)"
    )
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    assert [is_out_of_memory(e) for e in (cpu, cuda, MemoryError())] == [True] * 3
    assert [wanted(e) for e in (cpu, cuda, MemoryError())] == ["8.0 GiB", "20.00 GiB", ""]
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))
