"""A stage without memory: in words, with what it was doing and what helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from posttrain.backends.cpu.cache import Cache
from posttrain.backends.memory import MEMORY
from posttrain.engine.errors import StageError

TORCH = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8623489024 bytes."


def fail(*args: Any, **more: Any) -> Any:
    raise RuntimeError(TORCH)


def test_while_sampling(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Cache, "reach", fail)
    monkeypatch.setenv(MEMORY, "3G")
    settings = {"k": 2, "max_new_tokens": 6, "routes": {"short": ["one"], "words": ["one"]}}
    with pytest.raises(StageError) as error:
        run_stage("sample", settings, {"models.one": models["one"], **domains})
    told = str(error.value)
    assert told.startswith(
        "stage 'my_sample': out of memory on the cpu while sampling responses: 8.0 GiB more could "
        f"not be had; give {MEMORY} a lower number of bytes"
    )
    for part in ("(set to 3.0 GiB;", "lower max_new_tokens (6) or k (2)", "--jobs 1"):
        assert part in told


def test_while_learning(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", fail)
    with pytest.raises(
        StageError, match=r"while taking an optimiser step: 8.0 GiB .* batch_size"
    ) as error:
        run_stage("sft", {"steps": 1}, {"start": models["start"], **domains})
    assert MEMORY not in str(error.value)


def test_while_loading(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is wrong with the files of the checkpoint, so that is not said."""
    monkeypatch.setattr("posttrain.backends.checkpoint.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(StageError, match="out of memory on the cpu while loading a model"):
        run_stage("sft", {"steps": 1}, {"start": models["start"], **domains})


def test_another_error_stays_what_it_is(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other(*args: Any, **more: Any) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", other)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        run_stage("sft", {"steps": 1}, {"start": models["start"], **domains})
