"""Where a run computes: options that are refused before any stage begins, and what is recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.engine.store import Store

MINI = ("mini.py", "--suite", "pairs.toml")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "gpu"], ["--device", "'gpu'", "'auto', 'cpu', 'cuda'"]),
        (["--device", "cuda"], ["--device cuda", "sees no CUDA device", "--device cpu"]),
        (["--memory", "plenty"], ["'--memory'", "'plenty' is no number of bytes", "500M or 12G"]),
        (["--compile"], ["--compile", "measured slower", "--device cuda"]),
        (
            ["--set", "*.precision=float16"],
            ["'precision'", "'float16'", "choices: bfloat16, float32"],
        ),
    ],
)
def test_refusals(
    options: list[str],
    words: list[str],
    cli: Callable[..., Any],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = cli("run", *MINI, *options)
    assert result.code == 2
    for word in words:
        assert word in result.err
    assert not list(place.glob("posttrain-store/work/*"))
    assert not list(place.glob("posttrain-store/artifacts/*"))


def test_a_precision_without_hardware_is_refused_before_the_first_stage(
    cli: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    result = cli("run", *MINI, "--device", "cpu", "--set", "evaluation.precision=bfloat16")
    assert result.code == 2
    assert 'precision = "bfloat16": this CPU has neither' in result.err
    assert not list(place.glob("posttrain-store/work/*"))


def test_the_device_is_recorded(finished: Path) -> None:
    for artifact in Store(finished / "posttrain-store").list():
        assert artifact.provenance["device"].startswith(("cpu", "cuda ("))
        assert artifact.provenance["compile"] is False
        assert "device" not in artifact.record["payload"]["config"]


def test_one_stage_at_a_time_on_cuda_and_the_processes_are_told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.commands.run import choose
    from posttrain.engine.planner import plan
    from posttrain.language.loader import load_recipe

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 9")
    store = Store(place / "store")
    loaded = load_recipe("mini.py", store=store, suite="pairs.toml")
    rows = plan(loaded.graph, store)
    how = choose(rows, loaded, jobs=None, device="auto", compile=True)
    assert how.jobs == 1
    assert how.environment == {"POSTTRAIN_DEVICE": "cuda", "POSTTRAIN_COMPILE": "1"}
    assert how.facts == {"device": "cuda (Card 9)", "compile": True}
    assert choose(rows, loaded, jobs=3, device="cuda", compile=False).jobs == 3
    on_cpu = choose(rows, loaded, jobs=None, device="cpu", compile=False)
    assert on_cpu.environment == {"POSTTRAIN_DEVICE": "cpu"}


def test_the_memory_of_a_stage_is_told_and_recorded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the option, or else by the variable; nothing without both."""
    from posttrain.commands.run import choose
    from posttrain.engine.planner import plan
    from posttrain.language.loader import load_recipe

    store = Store(place / "store")
    loaded = load_recipe("mini.py", store=store, suite="pairs.toml")
    rows = plan(loaded.graph, store)

    def told(memory: str | None) -> tuple[str | None, Any]:
        how = choose(rows, loaded, jobs=None, device="cpu", compile=False, memory=memory)
        return how.environment.get("POSTTRAIN_MEMORY"), how.facts.get("memory")

    monkeypatch.setenv("POSTTRAIN_MEMORY", "3 GiB")
    assert told("1.5GB") == (str(3 * 2**29), 3 * 2**29)
    assert told(None) == (str(3 * 2**30), 3 * 2**30)
    monkeypatch.delenv("POSTTRAIN_MEMORY")
    assert told(None) == (None, None)


def test_the_same_recipe_in_bfloat16_is_another(done: Path, cli: Callable[..., Any]) -> None:
    """Precision is identity, the device is not."""
    stages = cli("plan", *MINI, "--set", "sft.precision=bfloat16", "--json").json["stages"]
    reasons = {stage["name"]: stage["reason"] for stage in stages}
    assert reasons["sft"] == 'precision: "float32" -> "bfloat16"'
    again = cli("run", *MINI, "--device", "cpu", "--no-report", "--json").json
    assert {stage["status"] for stage in again["stages"]} == {"cached"}
