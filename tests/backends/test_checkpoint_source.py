"""Outside checkpoints by their small files: what tells two apart, and which files are broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import weights_file

from posttrain.backends.checkpoint_source import CheckpointSource, find_checkpoint, token_conflict
from posttrain.engine.errors import ConfigError

Make = Callable[..., CheckpointSource]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(name, file=content)` writes a checkpoint's files; text as it is, else as JSON."""

    def make(name: str, files: dict[str, Any] | None = None) -> CheckpointSource:
        (tmp_path / name).mkdir()
        contents: dict[str, Any] = {
            "config.json": {"vocab_size": 2, "eos_token_id": 1},
            "model.safetensors": weights_file({"model.norm.weight": ("F32", (2,))}),
            "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}},
        }
        for file, content in (contents | (files or {})).items():
            if isinstance(content, bytes):
                (tmp_path / name / file).write_bytes(content)
                continue
            if file == "config.json" and isinstance(content, dict):
                content = {"model_type": "qwen2"} | content
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name / file).write_text(text)
        return find_checkpoint(tmp_path / name)

    return make


CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "vocabulary": (
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}}},
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 2}}}},
        ["'b' has id 2 in", "two/tokenizer.json and id 1 in", "one/tokenizer.json"],
    ),
    "token": (
        {},
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}},
        ["3 and 2 tokens", "'c' has id 2 in", "and no id in"],
    ),
    "added token in the place of another": (
        {},
        {
            "tokenizer.json": {
                "model": {"vocab": {"a": 0}},
                "added_tokens": [{"content": "c", "id": 1}],
            }
        },
        ["'b' has no id in", "and id 1 in"],
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_a_difference_is_told_with_both_values_and_files(make: Make, case: str) -> None:
    ours, theirs, words = CONFLICTS[case]
    conflict = token_conflict(make("one", ours), make("two", theirs))
    assert conflict is not None
    assert not [word for word in words if word not in conflict], conflict


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({}, {"config.json": {}}),
        ({}, {"tokenizer.json": {"model": {"vocab": [["a", 0.5]]}}}),
        ({}, {"chat_template.jinja": "A"}),
        # One id and a list of it, and the order of a list, mean the same.
        ({}, {"config.json": {"eos_token_id": [1]}}),
        ({"generation_config.json": {"eos_token_id": [0, 1]}},) * 2,
        # Rows of padding, what ends a turn and how a conversation is laid out are no tokens.
        ({}, {"config.json": {"vocab_size": 64}}),
        ({}, {"generation_config.json": {"eos_token_id": 0}}),
        ({"chat_template.jinja": "A"}, {"chat_template.jinja": "AB"}),
        # An added token that no text uses.
        (
            {},
            {
                "tokenizer.json": {
                    "model": {"vocab": {"a": 0, "b": 1}},
                    "added_tokens": [{"content": "c", "id": 2}],
                }
            },
        ),
    ],
)
def test_what_is_alike_or_unknown_is_no_conflict(
    make: Make, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert token_conflict(make("one", ours), make("two", theirs)) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"a": 1,\n "b" 2}', "line 2 column 6"),
        ("tokenizer.json", '{"model"', "line 1 column 9"),
        ("tokenizer_config.json", "", "line 1 column 1"),
        ("generation_config.json", "[1]", "holds a list"),
    ],
)
def test_broken_json_names_file_and_place(make: Make, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"one/{name}: .*{message}"):
        make("one", {name: text})


def test_binary_json_is_broken_json(make: Make) -> None:
    found = make("one")
    (found.directory / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"config\.json: not UTF-8 text .*position 7"):
        find_checkpoint(found.directory)


def test_a_hub_checkpoint_knows_its_id_commit_and_licence(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "c0ffee" * 6 + "c0ff"
    head = "---\nlicense: apache-2.0\ntags:\n  license: no\n---\n# Model\nlicense: no\n"
    make(commit, {"README.md": head})
    found = find_checkpoint(tmp_path / commit)
    assert found.origin == {"path": str(tmp_path / commit), "license": "apache-2.0"}
    assert "README.md" not in found.files, "its text is no part of what the model is"
    module = "posttrain.backends.checkpoint_source.download"
    monkeypatch.setattr(module, lambda source: tmp_path / commit)
    found = find_checkpoint("owner/name@main")
    assert found.origin == {
        "hub": "owner/name",
        "commit": commit,
        "revision": "main",
        "license": "apache-2.0",
    }
