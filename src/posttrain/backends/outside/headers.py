"""The headers of safetensors files: names, types and shapes of tensors, without their numbers.

A file is 8 bytes with the length of the header (little endian), the header, which is a JSON object,
and the numbers of all tensors without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
LONGEST = 100_000_000
"""Bytes of a header; the safetensors library refuses longer ones."""
FLOATS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
}  # fmt: skip
"""Types that posttrain computes with and saves, by their names in a header."""


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor of a file."""

    file: Path
    dtype: str
    """As the file has it, such as BF16."""
    shape: tuple[int, ...]


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads the weights from. Raises ConfigError where there are none,
    or where the index names one that is missing."""
    whole, index = directory / WEIGHTS, directory / INDEX
    if whole.exists():
        return [whole]
    if not index.exists():
        others = sorted(path.name for path in directory.glob("*.safetensors"))
        found = f" (there are {', '.join(others[:3])})" if others else ""
        raise ConfigError(
            f"{directory}: there is no {WEIGHTS} and no {INDEX}{found}; save the model with "
            "save_pretrained"
        )
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(parts))
        paths = [directory / str(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{index}: no index of weight files ({type(error).__name__}: {error}); fetch the "
            "checkpoint again"
        ) from error
    foreign = [name for name in names if Path(str(name)).name != name]
    if foreign:
        raise ConfigError(
            f"{index}: names {foreign[0]!r}, which is not the name of a file beside it; fetch the "
            "checkpoint again"
        )
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{index}: {len(missing)} of its {len(paths)} weight files are missing: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; fetch them again"
        )
    return paths


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """All tensors of a checkpoint by name. Raises ConfigError for files that are missing, cut
    short, or no safetensors files."""
    found: dict[str, TensorHeader] = {}
    for path in weight_files(directory):
        found |= read_header(path)
    return found


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one file by name. Raises ConfigError as `read_headers` does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= LONGEST or (first := file.read(1)) not in (b"{", b""):
            raise _broken(path, f"it is not a safetensors file (it begins with {start!r})")
        text = first + file.read(length - 1)
    if len(text) < length:
        raise _broken(path, f"it ends within its header, after {size} bytes: it was cut short")
    try:
        content = json.loads(text)
        entries = {name: entry for name, entry in content.items() if name != "__metadata__"}
        tensors = {name: _tensor(path, entry) for name, entry in entries.items()}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _broken(path, f"its header is not one ({type(error).__name__}: {error})") from error
    needed = 8 + length + max(ends, default=0)
    if size != needed:
        how = "was cut short" if size < needed else "has bytes that belong to no tensor"
        raise _broken(path, f"it has {size} bytes and its header asks for {needed}: it {how}")
    return tensors


def _tensor(path: Path, entry: Mapping[str, Any]) -> TensorHeader:
    shape = tuple(int(number) for number in entry["shape"])
    return TensorHeader(file=path, dtype=str(entry["dtype"]), shape=shape)


def _broken(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path}: {what}; fetch the file again")


def num_parameters(tensors: Mapping[str, TensorHeader]) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
