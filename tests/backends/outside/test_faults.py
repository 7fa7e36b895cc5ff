"""What a directory is that is no causal language model in plain numbers, told while planning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import weights_file

from posttrain.backends.checkpoint_source import CheckpointSource, find_checkpoint
from posttrain.backends.outside.faults import known_families
from posttrain.engine.errors import ConfigError

CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 10,
    "hidden_size": 4,
    "num_hidden_layers": 2,
}
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("BF16", (10, 4)),
    "model.layers.0.mlp.up_proj.weight": ("BF16", (8, 4)),
    "model.layers.1.mlp.up_proj.weight": ("BF16", (8, 4)),
    "model.norm.weight": ("F32", (4,)),
}
Make = Callable[..., CheckpointSource]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(config, tensors, files)`: the checkpoint above with these changes; None removes."""

    def make(
        config: dict[str, Any] | None = None,
        tensors: dict[str, Any] | None = None,
        files: dict[str, Any] | None = None,
    ) -> CheckpointSource:
        place = tmp_path / "m"
        place.mkdir()
        contents: dict[str, Any] = {
            "config.json": CONFIG | (config or {}),
            "model.safetensors": weights_file(TENSORS | (tensors or {})),
            "tokenizer.json": {"model": {"vocab": {"a": 0}}},
        }
        for name, content in (contents | (files or {})).items():
            if isinstance(content, bytes):
                (place / name).write_bytes(content)
            elif content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (place / name).write_text(text)
        return find_checkpoint(place)

    return make


def test_a_sound_checkpoint_is_read(make: Make) -> None:
    found = make()
    assert found.tensors["model.embed_tokens.weight"].shape == (10, 4)


GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "code beside a known family": ({"auto_map": {"AutoConfig": "own.Config"}}, {}),
    "more layers than asked for": ({"num_hidden_layers": 1}, {}),
    "nested": (
        {
            "model_type": "gemma3",
            "hidden_size": None,
            "vocab_size": None,
            "num_hidden_layers": None,
            "text_config": {"vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 2},
        },
        {"vision_tower.layers.30.weight": ("F32", (3, 3))},
    ),
    "factored embedding": ({"model_type": "opt", "hidden_size": 8, "word_embed_proj_dim": 4}, {}),
    "a decoder of an encoder's family": ({"model_type": "bert", "is_decoder": True}, {}),
    "integers beside": ({}, {"a": ("I32", (2, 2))}),
    "reward model": ({"architectures": ["Qwen2ForSequenceClassification"]}, {}),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_only_looks_odd_is_read(make: Make, case: str) -> None:
    config, tensors = GOOD[case]
    assert make(config, tensors).files


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": (
        {"config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}},
        r"config\.json: quantization_config: .*quantised \(gptq\)",
    ),
    "bitsandbytes": (
        {"config": {"quantization_config": {"load_in_4bit": True}}},
        r"config\.json: quantization_config",
    ),
    "compressed": (
        {"config": {"compression_config": {"quant_method": "compressed-tensors"}}},
        r"quantised \(compressed-tensors\)",
    ),
    "fp8 by the weights": (
        {"tensors": {n: ("F8_E4M3", s) for n, (_, s) in TENSORS.items()}},
        r"model\.safetensors: model\.embed_tokens\.weight is of type F8_E4M3",
    ),
    "adapter": (
        {"files": {"adapter_config.json": {"peft_type": "IA3"}}},
        r"adapter_config\.json: peft_type = 'IA3'.*merge_and_unload",
    ),
    "adapter alone": (
        {
            "files": {
                "adapter_config.json": {"peft_type": "LORA"},
                "config.json": None,
                "model.safetensors": None,
                "adapter_model.safetensors": b"",
            }
        },
        r"adapter_model\.safetensors: it is not a safetensors file",
    ),
    "bin": (
        {"files": {"model.safetensors": None, "pytorch_model.bin": b"PK"}},
        r"pytorch_model\.bin: weights in a form .*safe_serialization",
    ),
    "diffusers": (
        {"files": {"model_index.json": {"_class_name": "FluxPipeline"}}},
        r"model_index\.json: a diffusers pipeline",
    ),
    "encoder": (
        {"config": {"model_type": "bert", "architectures": ["BertForMaskedLM"]}},
        r"config\.json: model_type 'bert' \(BertForMaskedLM\): an encoder",
    ),
    "encoder by its head": (
        {"config": {"model_type": "eurobert", "architectures": ["EuroBertForMaskedLM"]}},
        "an encoder, whose tokens see later ones",
    ),
    "encoder-decoder": ({"config": {"model_type": "t5"}}, "'t5': an encoder-decoder"),
    "encoder-decoder by its word": (
        {"config": {"is_encoder_decoder": True}},
        "an encoder-decoder",
    ),
    "remote code": (
        {
            "config": {
                "model_type": "own_family",
                "auto_map": {
                    "AutoConfig": "configuration_own.OwnConfig",
                    "AutoModelForCausalLM": "o/n--modeling_own.OwnModel",
                },
            }
        },
        r"'own_family' is not one .*\(auto_map: configuration_own\.py, modeling_own\.py\)",
    ),
    "unknown family": ({"config": {"model_type": "qwen99"}}, "'qwen99' is none that the installed"),
    "no family": ({"config": {"model_type": None}}, r"config\.json: model_type is None"),
    "another model's embedding": (
        {"tensors": {"model.embed_tokens.weight": ("BF16", (10, 8))}},
        r"model\.safetensors: model\.embed_tokens\.weight is 10 x 8, and .*config\.json .*10 x 4",
    ),
    "fewer rows": (
        {"tensors": {"model.embed_tokens.weight": ("BF16", (9, 4))}},
        "is 9 x 4, and",
    ),
    "fewer layers": ({"config": {"num_hidden_layers": 3}}, "have 2 layers and .* asks for 3"),
    "no tensors": ({"files": {"model.safetensors": weights_file({})}}, "hold no tensors"),
    "cut short": (
        {"files": {"model.safetensors": weights_file(TENSORS, cut=5)}},
        r"model\.safetensors: .* it was cut short",
    ),
    "architectures": ({"config": {"architectures": [1.5]}}, r"architectures is \[1\.5\]"),
    "no list": ({"config": {"architectures": 1.5}}, r"architectures is 1\.5"),
    "deep": ({"files": {"config.json": '{"a":' * 100_000}}, r"config\.json: JSON of too many"),
    "long number": (
        {"files": {"config.json": '{"a": %s}' % ("1" * 5000)}},
        "config.json: holds a number that cannot be read",
    ),
    "huge": ({"files": {"config.json": " " * (16 * 2**20 + 1)}}, r"config\.json: 16777217 bytes"),
    "no tokenizer": (
        {"files": {"tokenizer.json": None, "tokenizer_config.json": {}}},
        r"holds no tokenizer \(config\.json, model\.safetensors, tokenizer_config\.json\)",
    ),
    "empty tokenizer": (
        {"files": {"tokenizer.json": None, "vocab.txt": ""}},
        r"vocab\.txt: an empty file",
    ),
    "template of bytes": (
        {"files": {"chat_template.jinja": b"\xff\xfe"}},
        r"chat_template\.jinja: not a text in UTF-8",
    ),
    "no config": ({"files": {"config.json": None}}, r"holds model\.safetensors, tokenizer\.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_told_with_the_file(make: Make, case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_bytes_need_no_vocabulary(make: Make) -> None:
    files = {"tokenizer.json": None, "tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}}
    assert make(files=files).vocabulary is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "T"}]}},
            ("tokenizer_config.json", "T"),
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag"}, 3]}}, None),
        ({"chat_template.jinja": "T"}, ("chat_template.jinja", "T")),
    ],
)
def test_the_template_is_the_one_that_transformers_takes(
    make: Make, files: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    assert make(files=files).chat_template == expected


def test_the_families_are_those_of_transformers() -> None:
    from transformers import CONFIG_MAPPING

    assert {"qwen3", "gpt_oss", "gemma3", "deepseek_v3"} <= known_families()
    assert set(CONFIG_MAPPING.keys()) <= known_families()


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json"])
def test_a_link_to_what_was_pruned_is_no_file_that_was_never_there(
    make: Make, tmp_path: Path, name: str
) -> None:
    make()
    (tmp_path / "m" / name).symlink_to("../blobs/0123")
    with pytest.raises(ConfigError, match=rf"{name}: a link to ../blobs/0123, which does not"):
        find_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_told_as_one(make: Make, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    with pytest.raises(ConfigError, match=rf"{name}: it is a Git LFS pointer"):
        make(files={name: pointer})


def test_a_file_in_place_of_a_directory(make: Make, tmp_path: Path) -> None:
    make()
    with pytest.raises(ConfigError, match=r"a file; give the directory that it lies in"):
        find_checkpoint(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"m has no config\.json; it holds model\.safetensors"):
        find_checkpoint(tmp_path / "m")
