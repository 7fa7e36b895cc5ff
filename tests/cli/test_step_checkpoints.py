"""Step checkpoints by name: shown, chatted with, exported and started from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain.engine.store import Store
from posttrain.stages import worker

RECIPE = """
from posttrain import Recipe
from posttrain.algorithms import AdamW

SHAPE = dict(hidden_size=16, num_layers=1, num_heads=1, head_dim=16, intermediate_size=16,
             max_positions=32)


def recipe(r: Recipe, start: str = "", steps: int = 5, ema: bool = True, name: str = "tuned"):
    data = r.demos(r.domains)
    if start:
        return r.sft(start=r.model(start), data=data, steps=1, batch_size=4, name="onward")
    base = r.pretrain(data=data, steps=1, batch_size=4, **SHAPE)
    return r.sft(start=base, data=data, steps=steps, batch_size=4, lr=0.01, name=name,
                 warmup_steps=1, lr_decay="constant", trainable=["*mlp*", "*embed*"],
                 optimizer=AdamW(ema=0.5 if ema else None))
"""
SHORT = ("short.py", "--suite", "pairs.toml")


@pytest.fixture
def stopped(cli: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stage `tuned` that failed after its third step."""
    (place / "short.py").write_text(RECIPE)
    with monkeypatch.context() as patch:
        stages = Path(__file__).with_name("stopping_stages.py")
        patch.setattr(worker, "EXECUTE", f"{stages}:run_job")
        failed = cli("run", *SHORT, "--no-report")
    assert failed.code == 1 and "stopped by the test" in failed.err
    return place


def test_by_name_it_is_what_a_stage_of_so_many_steps_makes(
    cli: Callable[..., Any], stopped: Path
) -> None:
    # With a constant rate three of five steps are three of three, the moving average included.
    whole = cli("run", *SHORT, "--set", "steps=3", "--set", "name=whole", "--no-report", "--json")
    made = load_file(Path(whole.json["stages"][-1]["artifact"]) / "model.safetensors")

    listed = cli("ls", "--json").json["unfinished"]
    assert [(one["name"], one["kind"], one["step"]) for one in listed] == [("tuned", "sft", 3)]
    assert "unfinished: tuned (sft), tuned@step-3" in cli("ls").out
    assert "tuned  sft, unfinished, step 3" in cli("show", "tuned@step").out
    shown = cli("show", "tuned@step-3", "--json").json
    assert (shown["step"], shown["kind"], shown["config"]["steps"]) == (3, "sft", 5)
    assert "loss" in shown["metrics"] and shown["tokens"] > 0

    exported = cli("export", "tuned@step", "out")
    assert exported.code == 0 and exported.err == "", exported.err
    card = (stopped / "out/README.md").read_text()
    assert "the step checkpoint tuned@step-3 of a stage that was not finished (sft" in card
    assert "from outside" not in card and "no parents" not in card
    found = load_file(stopped / "out" / "model.safetensors")
    assert found.keys() == made.keys()
    assert all(torch.equal(found[name], made[name]) for name in made)
    answer = cli("chat", "tuned@step", "--prompt", "1+1=", "--max-new-tokens", "2")
    assert answer.code == 0, answer.err

    # Taken out once: the model stays when the stage has gone on to its end.
    onward = cli("run", *SHORT, "--set", "start=tuned@step", "--no-report", "--json").json
    cached = {stage["name"]: stage["status"] for stage in onward["stages"]}
    assert cached["base"] == "cached" and cached["onward"] == "ran"
    assert [a.name for a in Store(stopped / "posttrain-store").list() if a.kind == "model"] == [
        "tuned.step-3"
    ]
    assert cli("run", *SHORT, "--no-report").code == 0
    again = cli("plan", *SHORT, "--set", "start=tuned@step-3", "--json").json
    assert {stage["action"] for stage in again["stages"]} == {"cached"}
    gone = cli("show", "tuned@step")
    assert gone.code == 2 and "'tuned' is finished, name it without @step" in gone.err


def test_what_is_not_there(cli: Callable[..., Any], stopped: Path) -> None:
    for text, problem in {
        "tunde@step": "no unfinished stage 'tunde'",
        "base@step": "'base' is finished, name it without @step",
        "tuned@step-120": "is that of step 3, and older ones are not kept; give tuned@step-3",
    }.items():
        for command in (["show", text], ["export", text, "out"], ["chat", text, "--prompt", "x"]):
            result = cli(*command)
            assert result.code == 2 and problem in " ".join(result.err.split())
        result = cli("plan", *SHORT, "--set", f"start={text}")
        assert result.code == 2 and problem in " ".join(result.err.split())


def test_what_has_no_step_checkpoint_is_not_meant(
    cli: Callable[..., Any], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stage of the same name that failed before its first step checkpoint.
    with monkeypatch.context() as patch:
        patch.setattr(worker, "EXECUTE", "posttrain.no_such_module:run_job")
        cli("run", *SHORT, "--no-report", "--set", "ema=false")
    assert "unfinished, no step checkpoint: tuned" in cli("ls").out
    assert "unfinished, step 3" in cli("show", "tuned@step").out


def test_two_of_a_name_are_told_apart(
    cli: Callable[..., Any], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Path(__file__).with_name("stopping_stages.py")
    monkeypatch.setattr(worker, "EXECUTE", f"{stages}:run_job")
    cli("run", *SHORT, "--no-report", "--set", "ema=false")
    result = cli("show", "tuned@step")
    assert result.code == 2 and "could be 2 unfinished stages" in result.err
    labels = [line.split("@")[0].strip() for line in result.err.splitlines() if "@step  (" in line]
    assert len(labels) == 2
    for label in labels:
        shown = cli("show", f"{label}@step", "--json").json
        assert label == f"tuned-{shown['fingerprint'][:12]}"
        exported = cli("export", f"{label}@step", f"out-{label}")
        assert exported.code == 0, exported.err


def test_a_stage_without_a_checkpoint_says_so(cli: Callable[..., Any], stopped: Path) -> None:
    work = next((stopped / "posttrain-store" / "work").glob("*/step.json"))
    work.unlink()
    result = cli("chat", "tuned@step", "--prompt", "x")
    assert result.code == 2 and "tuned has no step checkpoint yet" in result.err
    assert "unfinished, no step checkpoint: tuned" in cli("ls").out


def test_a_start_that_was_changed_is_told(cli: Callable[..., Any], stopped: Path) -> None:
    """Its tokenizer and config would become those of the model that is taken out."""
    (base,) = (stopped / "posttrain-store" / "artifacts" / "pretrain").glob("*/tokenizer.json")
    base.write_text(base.read_text() + " ")
    found = cli("export", "tuned@step", "out")
    assert found.code == 2
    assert "input start" in found.err and "tokenizer.json was changed" in found.err
    assert not (stopped / "out").exists()
