"""Saved weights have the types of the start's files, tensor by tensor, or the one asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.backends.checkpoint import LanguageModel, load, save
from posttrain.backends.outside.headers import read_headers
from posttrain.backends.saved_types import read_types, recast, widest

MakeModel = Callable[..., LanguageModel]
NORM = "model.norm.weight"


def config_dtype(path: Path) -> str:
    return str(json.loads((path / "config.json").read_text())["dtype"])


@pytest.fixture
def mixed(make_model: MakeModel, tmp_path: Path) -> Path:
    """A bfloat16 checkpoint whose last norm is float32."""
    path = tmp_path / "mixed"
    save(make_model(), path, types="bfloat16")
    tensors = load_file(path / "model.safetensors")
    tensors[NORM] = tensors[NORM].float() + 2**-12
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_the_types_of_the_start_are_kept_tensor_by_tensor(mixed: Path, tmp_path: Path) -> None:
    language_model = load(mixed)
    assert language_model.model.dtype == torch.float32
    save(language_model, tmp_path / "out", types=language_model.types)
    assert read_types(tmp_path / "out") == read_types(mixed) | {NORM: "float32"}
    assert config_dtype(tmp_path / "out") == "bfloat16"
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "out", mixed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_tensor_that_the_start_lacks_has_the_type_of_most_numbers(
    mixed: Path, tmp_path: Path
) -> None:
    language_model = load(mixed)
    types = {n: t for n, t in language_model.types.items() if "layers.0" not in n}
    save(language_model, tmp_path / "out", types=types)
    assert read_types(tmp_path / "out") == read_types(mixed)


def test_float32_stays_bit_for_bit(make_model: MakeModel, tmp_path: Path) -> None:
    save(make_model(), tmp_path / "one")
    language_model = load(tmp_path / "one")
    save(language_model, tmp_path / "two", types=language_model.types)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not recast(tmp_path / "two", "float32")


def test_one_type_for_all_rounds_to_nearest(mixed: Path) -> None:
    before = load_file(mixed / "model.safetensors")
    assert recast(mixed, "float16")
    after = load_file(mixed / "model.safetensors")
    assert all(torch.equal(after[name], before[name].half()) for name in before)
    assert config_dtype(mixed) == "float16"
    assert load(mixed).types == dict.fromkeys(before, "float16")


def test_shards_are_rounded_one_by_one(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    paths = list(tmp_path.glob("*.safetensors"))
    assert len(paths) > 1
    whole = sum(path.stat().st_size for path in paths)
    assert recast(tmp_path, "bfloat16")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 0.6 * whole and json.loads(index.read_text())["metadata"]["total_size"] == size
    assert {tensor.dtype for tensor in read_headers(tmp_path).values()} == {"BF16"}
    assert sorted(tmp_path.glob(".*")) == []


def test_the_widest_type_holds_the_numbers_of_all() -> None:
    one = {"a": "bfloat16", "b": "bfloat16", "c": "float32"}
    other = {"a": "bfloat16", "b": "float16", "d": "float16"}
    assert widest([one]) == one
    assert widest([one, other]) == {"a": "bfloat16", "b": "float32", "c": "float32", "d": "float16"}
