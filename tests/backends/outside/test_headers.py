"""Headers of safetensors files: as the library reads them, and damaged files are told in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import weights_file

from posttrain.backends.outside.headers import (
    num_parameters,
    read_header,
    read_headers,
)
from posttrain.engine.errors import ConfigError


def test_a_header_says_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.zeros(3, 4, dtype=torch.bfloat16),
        "norm": torch.zeros(4),
        "n": torch.zeros(100, dtype=torch.int64),
        "empty": torch.zeros(0, 2),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        "a": ("BF16", (3, 4)),
        "norm": ("F32", (4,)),
        "n": ("I64", (100,)),
        "empty": ("F32", (0, 2)),
    }
    assert num_parameters(found) == 12 + 4 + 100


WHOLE = weights_file({"a": ("F32", (2, 2))})
BROKEN: dict[str, tuple[bytes, str]] = {
    "cut": (WHOLE[:-3], "header asks for .* it was cut short"),
    "cut header": (WHOLE[:20], "within its header, after 20 bytes"),
    "longer": (WHOLE + b"x", "has bytes that belong to no tensor"),
    "empty": (b"", "not a safetensors file"),
    "huge length": (b"\xff" * 16, "not a safetensors file"),
    "pickle": (b"PK\x03\x04" + bytes(40), "not a safetensors file"),
    "no json": ((4).to_bytes(8, "little") + b"{{{{", "its header is not one"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "not a safetensors file"),
    "deep": ((400000).to_bytes(8, "little") + b'{"a":' * 80000, "its header is not one"),
    "no shape": ((8).to_bytes(8, "little") + b'{"a":{}}', "its header is not one"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_is_told_by_name(tmp_path: Path, case: str) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"model\.safetensors: .*{words}.*fetch"):
        read_headers(tmp_path)


def index(directory: Path, weight_map: object) -> None:
    text = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(WHOLE)
    (tmp_path / "two.safetensors").write_bytes(weights_file({"b": ("BF16", (8,))}))
    (tmp_path / "other.safetensors").write_bytes(b"not read")
    with pytest.raises(ConfigError, match=r"no model\.safetensors .*there are one.safetensors"):
        pytest.fail(str(read_headers(_only(tmp_path, "one.safetensors"))))
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert set(read_headers(tmp_path)) == {"a", "b"}
    index(tmp_path, {"a": "one.safetensors", "b": "three.safetensors"})
    with pytest.raises(ConfigError, match=r"1 of its 2 weight files are missing: three\."):
        read_headers(tmp_path)
    for strange in ({"a": "../one.safetensors"}, {"a": 3}, ["one.safetensors"], None):
        index(tmp_path, strange)
        with pytest.raises(ConfigError, match=r"index\.json: (no index|names)"):
            read_headers(tmp_path)


def _only(directory: Path, name: str) -> Path:
    folder = directory / "only"
    folder.mkdir()
    (folder / name).write_bytes((directory / name).read_bytes())
    return folder
