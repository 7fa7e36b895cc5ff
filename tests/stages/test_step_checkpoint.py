"""The model in a step checkpoint is the one that the stage would make of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain.engine.errors import ConfigError
from posttrain.engine.store import Store
from posttrain.engine.unfinished import Unfinished, split_place
from posttrain.stages.config import build_config
from posttrain.stages.context import Context
from posttrain.stages.step_checkpoint import save_model, step_model

SHORT: dict[str, Any] = {"steps": 2, "lr": 0.02, "warmup_steps": 1}
SAMPLED = SHORT | {"prompts_per_step": 2, "max_new_tokens": 3}
SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "head_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    "pretrain": SHORT | SMALL | {"batch_size": 4},
    "sft": SHORT | {"batch_size": 4, "precision": "bfloat16", "optimizer": {"ema": 0.5}},
    "reward_model": SHORT | {"batch_size": 4},
    "rl": SAMPLED | {"advantage": "gae"},
    "distill": SAMPLED | {"routes": {"short": "t", "words": "t"}, "trainable": ["*mlp*"]},
}


@pytest.mark.parametrize("kind", CASES)
def test_after_the_last_step_it_is_the_model_of_the_stage(
    kind: str,
    run_stage: Callable[..., Any],
    edges: Callable[..., dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Context, "checkpoint", Context.save)
    work, inputs = tmp_path / "stage", edges(kind)
    ran = run_stage(kind, CASES[kind], inputs, work)
    config = build_config(kind, "mine", CASES[kind]).to_json()
    stage = {"name": "mine", "kind": kind, "config": config, "inputs": inputs}
    out = tmp_path / "taken"
    save_model(Unfinished(path=work, stage=stage, step=2), tmp_path / "scratch", out)
    found, made = (load_file(path / "model.safetensors") for path in (out, ran.out))
    assert found.keys() == made.keys()
    assert all(torch.equal(found[name], made[name]) for name in made)
    # Beside the weights, what the stage writes beside them; its card and log are its own.
    own = {"README.md", "metrics.jsonl", "rollouts.jsonl", "samples.jsonl"}
    assert {p.name for p in out.iterdir()} == {p.name for p in ran.out.iterdir()} - own


def work_of(store: Store, kind: str, files: Mapping[str, Any]) -> None:
    """A stage in progress, made up."""
    work = store.work_path("a" * 64)
    work.mkdir(parents=True)
    (store.root / "store.json").write_text('{"format": 1}')
    stage = {"name": "mine", "kind": kind, "fingerprint": "a" * 64, "config": {}, "inputs": {}}
    for name, content in ({"stage.json": stage} | files).items():
        (work / name).write_text(json.dumps(content))


def test_a_kind_that_trains_nothing_has_no_model(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    work_of(store, "select", {"step.json": {"step": 3}})
    with pytest.raises(ConfigError, match="a stage of kind select trains no model"):
        step_model(store, "mine@step")


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a@step", ("a", None)), ("a-b.c@step-12", ("a-b.c", 12))],
)
def test_places(text: str, parts: tuple[str, int | None]) -> None:
    assert split_place(text) == parts
