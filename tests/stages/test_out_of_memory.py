"""A stage without memory: in words, with what it was doing and what helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain.backends.checkpoint import LanguageModel, save
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
        "not be had; by estimation this takes "
    )
    for part in (
        "keys and values of",
        "weights of the sampler",
        f"give --memory ({MEMORY}) a lower number of bytes (set to 3.0 GiB;",
        "lower max_new_tokens (6) or k (2)",
        "--jobs 1",
    ):
        assert part in told
    assert "optimizer" not in told


def test_while_learning(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", fail)
    monkeypatch.delenv(MEMORY, raising=False)
    with pytest.raises(
        StageError, match=r"while taking an optimiser step: 8.0 GiB .* batch_size"
    ) as error:
        run_stage("sft", {"steps": 1}, {"start": models["start"], **domains})
    told = str(error.value)
    for part in (
        "weights that learn in float32",
        "optimiser moments in float32",
        "activations of 2,048 tokens",
        f"--memory ({MEMORY}) a lower number of bytes (",
        " without it; no part",
        'precision = "bfloat16"',
        'optimizer.states = "int8"',
    ):
        assert part in told
    assert "stochastic" not in told


def test_while_loading(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is wrong with the files of the checkpoint, so that is not said."""
    monkeypatch.setattr("posttrain.backends.checkpoint.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(StageError, match="out of memory on the cpu while loading a model") as error:
        run_stage("sft", {"steps": 1}, {"start": models["start"], **domains})
    assert "--memory" not in str(error.value)


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from posttrain.engine.process import Job
from posttrain.stages.config import build_config
from posttrain.stages.worker import run_job

work, inputs = Path(sys.argv[1]), json.loads(sys.argv[2])
(work / "out").mkdir(parents=True)
settings = {"steps": 2, "batch_size": 64, "precision": "bfloat16"}
job = Job(
    name="tight", kind="sft", version=1, fingerprint="0" * 64, data={}, runtime={}, inputs=inputs,
    config=build_config("sft", "tight", settings).to_json(), work=str(work), out=str(work / "out"),
    threads=1, hashes=str(work / "hashes.json"),
)
from posttrain.backends import local  # before there is a limit
from posttrain.stages import supervised
torch.ones(64, 64) @ torch.ones(64, 64)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 60 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    run_job(job)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_real_limit(
    domains: Mapping[str, str], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """60 MB more than the libraries take, for a model of 16 million parameters."""
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=5,
        num_attention_heads=8,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    made = make_model(stop=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = made.model.generation_config
    save(LanguageModel(model=model, tokenizer=made.tokenizer), tmp_path / "start")
    (tmp_path / "start" / "record.json").write_text(
        json.dumps({"format": 1, "name": "start", "kind": "model", "fingerprint": "1" * 64})
    )
    inputs = json.dumps({"start": str(tmp_path / "start"), **domains})
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "work"), inputs],
        capture_output=True,
        text=True,
        env={**os.environ, MEMORY: ""},
        check=True,
    )
    told = done.stdout.splitlines()[-1]
    assert told.startswith("StageError: stage 'tight': out of memory on the cpu while ")
    assert "run fewer stages at once (--jobs 1)" in told


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
