"""A checkpoint from outside becomes an artifact only as the bytes that the plan has seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.backends.checkpoint import LanguageModel, save
from posttrain.backends.checkpoint_source import find_checkpoint
from posttrain.engine.errors import ConfigError
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
