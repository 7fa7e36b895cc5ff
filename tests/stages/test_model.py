"""A checkpoint from outside becomes an artifact only as the bytes that the plan has seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.backends.checkpoint import LanguageModel, save
from posttrain.backends.checkpoint_source import find_checkpoint
from posttrain.engine.errors import ConfigError
from posttrain.engine.work import read_warnings
from posttrain.stages.context import Context
from posttrain.stages.models import link_model


def test_files_that_changed_after_the_plan_are_refused(
    tmp_path: Path, make_model: Callable[..., LanguageModel]
) -> None:
    save(make_model(), tmp_path / "mine")
    planned = find_checkpoint(tmp_path / "mine")
    arguments = (planned.directory, list(planned.files), planned.sha256)
    first = Context(name="base", work=tmp_path / "first", inputs={}, threads=1)
    assert link_model(*arguments, first)["parameters"] > 0
    assert (first.out / "model.safetensors").is_symlink()

    config = planned.directory / "generation_config.json"
    config.write_text(config.read_text() + " ")
    second = Context(name="base", work=tmp_path / "second", inputs={}, threads=1)
    with pytest.raises(ConfigError, match="mine: its files changed since this run was planned"):
        link_model(*arguments, second)
    assert not list(second.out.iterdir())


def test_what_a_model_leaves_out_is_told(
    tmp_path: Path, make_model: Callable[..., LanguageModel]
) -> None:
    save(make_model(), tmp_path / "mine")
    path = tmp_path / "mine" / "model.safetensors"
    save_file(load_file(path) | {"vision_tower.weight": torch.zeros(2, 2)}, path)
    found = find_checkpoint(tmp_path / "mine")
    ctx = Context(name="base", work=tmp_path / "work", inputs={}, threads=1)
    link_model(found.directory, found.files, found.sha256, ctx)
    (said,) = read_warnings(tmp_path / "work")
    assert "1 of its tensors, such as vision_tower.weight, are no part of Qwen3ForCausalLM" in said
