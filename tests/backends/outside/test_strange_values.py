"""Values of any JSON type where a checkpoint's files have others: read, or told in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import weights_file

from posttrain.backends.checkpoint_source import ends_of, find_checkpoint, token_conflict
from posttrain.backends.outside.positions import positions_of
from posttrain.engine.errors import ConfigError

STRANGE: list[Any] = [None, True, -1, 1e308, "x", [], [3, None], {}, {"a": {"b": [None]}}, "\x00"]
KEYS = {
    "config.json": [
        "model_type", "architectures", "auto_map", "quantization_config", "compression_config",
        "text_config", "rope_parameters", "rope_scaling", "max_position_embeddings", "vocab_size",
        "hidden_size", "num_hidden_layers", "is_encoder_decoder", "eos_token_id",
        "original_max_position_embeddings",
    ],
    "generation_config.json": ["eos_token_id"],
    "tokenizer_config.json": [
        "tokenizer_class", "chat_template", "eos_token", "added_tokens_decoder",
    ],
    "tokenizer.json": ["model", "added_tokens"],
}  # fmt: skip


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    contents: dict[str, Any] = {
        "config.json": {"model_type": "qwen2", "vocab_size": 2, "eos_token_id": 1},
        "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}},
        "tokenizer_config.json": {"chat_template": "{{ messages }}", "eos_token": "b"},
        "generation_config.json": {},
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    tensors = {"model.embed_tokens.weight": ("F32", (2, 4))}
    (tmp_path / "model.safetensors").write_bytes(weights_file(tensors))
    return tmp_path


@pytest.mark.parametrize("name", KEYS)
def test_no_value_of_a_file_is_a_traceback(sound: Path, name: str) -> None:
    path = sound / name
    content = json.loads(path.read_text())
    outcomes = {"read": 0, "refused": 0}
    for key in KEYS[name]:
        for value in STRANGE:
            path.write_text(json.dumps(content | {key: value}))
            try:
                found = find_checkpoint(sound)
                positions_of(found.config)
                token_conflict(found, found)
                ends_of(found)
                outcomes["read"] += 1
            except ConfigError as error:
                assert str(sound) in str(error)
                outcomes["refused"] += 1
    assert sum(outcomes.values()) == len(KEYS[name]) * len(STRANGE)
    assert outcomes["read"] > 0


def test_an_empty_vocabulary_is_told(sound: Path) -> None:
    (sound / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json: a vocabulary without tokens"):
        find_checkpoint(sound)
