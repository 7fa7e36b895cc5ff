"""What was made room by room, in one stage: adapters on one base as student and as teachers that
rest, bfloat16, moments in 8 bits, a moving average, gradient checkpointing, and a stop between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.backends import memory
from posttrain.backends.local import LocalBackend
from posttrain.backends.local_learner import LocalLearner
from posttrain.engine.record import RECORD, label_of
from posttrain.stages import teachers as stage

pytest.importorskip("peft")
LORA = {"rank": 4, "alpha": 8.0}
SETTINGS: dict[str, Any] = {
    "steps": 4,
    "prompts_per_step": 12,
    "max_new_tokens": 6,
    "lr": 0.01,
    "warmup_steps": 1,
    "precision": "bfloat16",
    "lora": LORA,
    "routes": {"short": "first", "words": "second"},
}


@pytest.fixture
def base(models: Mapping[str, str], tmp_path: Path) -> str:
    """A checkpoint that lies to the work directories of the stages as one of a store does."""
    record = json.loads((Path(models["start"]) / RECORD).read_text())
    place = tmp_path / record["kind"] / label_of(record)
    shutil.copytree(models["start"], place)
    return str(place)


@pytest.fixture
def specialists(
    base: str,
    run_stage: Callable[..., Any],
    domains: Mapping[str, str],
    models: Mapping[str, str],
) -> dict[str, str]:
    """Two adapters of it."""
    found = {}
    for seed, name in enumerate(("first", "second")):
        how = {"steps": 4, "batch_size": 8, "lr": 0.02, "seed": seed, "lora": LORA}
        out = run_stage("sft", how, {"start": base, **domains}).out
        shutil.copy(Path(models["one"]) / RECORD, out)
        found[name] = str(out)
    return found


@pytest.mark.parametrize("states", ["float32", "int8"])
def test_a_stopped_distillation_of_adapters_on_one_base_goes_on(
    base: str,
    specialists: Mapping[str, str],
    run_stage: Callable[..., Any],
    goes_on: Callable[..., Any],
    domains: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
    states: str,
) -> None:
    if states == "int8":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(stage, "REST_BYTES", 1)
    loaded, passes = [], set()
    load, checkpoints = LocalBackend._load, LocalLearner._checkpoints

    def noted(self: LocalBackend, checkpoint: Path, *how: Any) -> Any:
        loaded.append(checkpoint)
        return load(self, checkpoint, *how)

    def asked(self: LocalLearner, forward: Any) -> bool:
        passes.add(checkpoints(self, forward))
        return checkpoints(self, forward)

    monkeypatch.setattr(LocalBackend, "_load", noted)
    monkeypatch.setattr(LocalLearner, "_checkpoints", asked)
    # So little memory that layers are computed again.
    monkeypatch.setenv(memory.MEMORY, "64K")
    inputs = {"start": base, **{f"teachers.{n}": p for n, p in specialists.items()}, **domains}
    config = SETTINGS | {"optimizer": {"states": states, "ema": 0.9}}

    def run(work: Path | None) -> Any:
        return run_stage("distill", config, inputs, work)

    calm, _ = goes_on(run, saved=2, killed=3)
    assert calm.lines[-1]["kl"] > 0
    assert (calm.out / "adapter_model.safetensors").is_file()
    assert not (calm.out / "model.safetensors").exists()
    assert list(map(str, loaded)) == [base] * 3, "once in each attempt"
    assert passes == {True}
