"""Which files are the checkpoint: all that transformers may read, and no link to a stranger's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub.utils._paths import filter_repo_objects
from tests.conftest import weights_file

from posttrain.backends.checkpoint_source import find_checkpoint
from posttrain.backends.outside.files import (
    CARD,
    NEVER_READ,
    OTHER_FOLDERS,
    check_links,
    is_model_file,
    model_files,
)
from posttrain.engine.errors import ConfigError

PLAIN = [
    "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json",
    "merges.txt", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors", "model.safetensors.index.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
]  # fmt: skip
"""What counted as a checkpoint when there was a list of it."""
FAMILIES = [
    "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json",
    "qwen.tiktoken", "vocab.bpe", "tokenizer.model.v3", "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json", "dict.txt", "spm.model", "emoji.json",
]  # fmt: skip
OTHERS = [
    "README.md", "LICENSE", "LICENSE.txt", "Notice", "pytorch_model.bin", "model.gguf",
    "model.onnx",
    "pytorch_model.bin.index.json", "optimizer.pt", "rng_state.pth", "trainer_state.json",
    "modeling_own.py", "flax_model.msgpack", "tf_model.h5", "banner.png", "history.json",
    "record.json", "code.diff", "metrics.jsonl", "rollouts.jsonl", "best.json", ".gitattributes",
    "consolidated.00.safetensors", "eval_results.json", "train.log", "original/params.json",
    "checkpoint-100/model.safetensors", "onnx/model.onnx", "admin/x.json", "adapter/config.json",
    "a/x.json", "runs/events.out.tfevents.1",
]  # fmt: skip


def fill(directory: Path, names: list[str]) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)


def test_all_that_may_be_read_is_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path, PLAIN + OTHERS)
    assert model_files(tmp_path) == PLAIN, (
        "the identity of what was a checkpoint before is the same"
    )
    fill(tmp_path, FAMILIES)
    assert model_files(tmp_path) == sorted(PLAIN + FAMILIES)


def test_the_hub_is_asked_for_the_same_files() -> None:
    names = [*PLAIN, *FAMILIES, *OTHERS]
    ignored = [p for p in (*NEVER_READ, *OTHER_FOLDERS) if p != CARD]
    fetched = set(filter_repo_objects(names, ignore_patterns=ignored))
    # `admin/` is fetched and not used: a glob cannot say "all folders but one".
    capitals = {"LICENSE", "LICENSE.txt", "Notice"}
    assert fetched - capitals == {*PLAIN, *FAMILIES, "README.md", "admin/x.json"}


def test_no_file_of_any_tokenizer_of_transformers_is_left_out() -> None:
    """Read off its source, so that a new family's file is not forgotten."""
    package = Path(transformers.__file__).parent
    paths = [*package.glob("models/*/tokenization_*.py"), package / "tokenization_utils_base.py"]
    names: set[str] = set()
    for path in paths:
        for found in re.findall(r"VOCAB_FILES_NAMES *= *\{([^}]*)\}", path.read_text("utf-8")):
            names |= set(re.findall(r': *"([^"]+)"', found))
    assert len(names) > 8
    assert {name for name in names if not is_model_file(name)} == set()


def checkpoint(directory: Path, **more: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 2}')
    tensors = {"model.norm.weight": ("F32", (2,))}
    (directory / "model.safetensors").write_bytes(weights_file(tensors))
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    return directory


def test_a_tokenizer_file_of_any_name_is_in_the_identity(tmp_path: Path) -> None:
    place = checkpoint(tmp_path / "m")
    (place / "tokenizer.json").rename(place / "spiece.model")
    first = find_checkpoint(place)
    assert "spiece.model" in first.files
    (place / "spiece.model").write_text("other")
    assert find_checkpoint(place).sha256 != first.sha256
    (place / "notes.md").write_text("other")
    (place / "spiece.model").write_text((place / "spiece.model").read_text())
    assert "notes.md" not in find_checkpoint(place).files


@pytest.mark.parametrize("name", ["vocab.json", "chat_template.jinja", "config.json"])
def test_a_link_out_of_the_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    place = checkpoint(tmp_path / "m")
    secret = tmp_path / "secret.json"
    secret.write_text('{"model_type": "qwen2", "password": 1}')
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to(secret)
    with pytest.raises(ConfigError, match=rf"m/{name}: a link to .*secret\.json, outside"):
        find_checkpoint(place)
    # What a store holds was looked at when it came into it.
    assert find_checkpoint(place, store=tmp_path).files


def test_links_of_a_hub_cache_inside_a_checkpoint_and_of_weights_are_followed(
    tmp_path: Path,
) -> None:
    place = checkpoint(tmp_path / "models--o--n" / "snapshots" / "c0ffee")
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (place / name).rename(blobs / f"hash-{name}")
        (place / name).symlink_to(Path("..", "..", "blobs", f"hash-{name}"))
    assert find_checkpoint(place).files == ("config.json", "model.safetensors", "tokenizer.json")
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (mine / name).write_text((place / name).read_text())
    (mine / "model.safetensors").symlink_to(place / "model.safetensors")
    (mine / "vocab.json").symlink_to("tokenizer.json")
    assert find_checkpoint(mine).vocabulary == {"a": 0, "b": 1}
    with pytest.raises(ConfigError, match="outside of the checkpoint"):
        check_links(
            tmp_path / "models--o--n" / "snapshots" / "c0ffee", ["../../../mine/config.json"]
        )
