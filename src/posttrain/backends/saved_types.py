"""The types of the numbers in saved weights: those of the checkpoint a stage began with, or one for
all.

Weights learn in float32. Most published checkpoints are bfloat16, and so is what a stage makes of
one, unless its `save_dtype` says otherwise: each tensor has the type it has in the start's files (a
router that is float32 among bfloat16 matrices stays so), and one that the start lacks has the type
of most numbers.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.backends.outside.adapters import base_of, is_adapter
from posttrain.backends.outside.headers import (
    FLOATS,
    INDEX,
    TensorHeader,
    read_header,
    read_headers,
    weight_files,
)

Types = Mapping[str, str]
"""Name of a tensor to its floating-point type, such as "bfloat16"."""


def types_of(tensors: Mapping[str, TensorHeader]) -> dict[str, str]:
    """The types of the tensors that hold floating-point numbers."""
    return {n: FLOATS[tensor.dtype] for n, tensor in tensors.items() if tensor.dtype in FLOATS}


def read_types(directory: Path) -> dict[str, str]:
    """`types_of` a checkpoint, of an adapter those of its base. Raises ConfigError for weights that
    cannot be read."""
    while is_adapter(directory):
        directory = base_of(directory)
    return types_of(read_headers(directory))


def widest(models: Sequence[Types]) -> dict[str, str]:
    """For each tensor the type that holds the numbers of all models."""
    found: dict[str, str] = {}
    for types in models:
        for name, dtype in types.items():
            both = torch.promote_types(
                getattr(torch, found.get(name, dtype)), getattr(torch, dtype)
            )
            found[name] = str(both).removeprefix("torch.")
    return found


def recast(directory: Path, types: Types | str) -> bool:
    """Round the weights of a saved checkpoint to these types, file by file; whether any changed.

    One type for all, or one for each tensor. config.json then names the type of most numbers.
    """
    paths = weight_files(directory)
    main = types if isinstance(types, str) else _main(directory, types)
    changed, total = False, 0
    for path in paths:
        have = types_of(read_header(path))
        wanted = {n: types if isinstance(types, str) else types.get(n, main) for n in have}
        if wanted != have:
            _rewrite(path, wanted)
            changed = True
        total += path.stat().st_size
    if changed:
        _edit(directory / "config.json", _with_dtype, main)
        if (directory / INDEX).is_file():
            _edit(directory / INDEX, _with_size, total)
    return changed


def _main(directory: Path, types: Types) -> str:
    """The type of most numbers that will be there."""
    counts: Counter[str] = Counter()
    for name, tensor in read_headers(directory).items():
        if name in types:
            counts[types[name]] += torch.Size(tensor.shape).numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else "float32"


def _rewrite(path: Path, wanted: Types) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors: dict[str, Tensor] = {
        name: tensor.to(getattr(torch, wanted[name])) if name in wanted else tensor
        for name, tensor in load_file(path).items()
    }
    beside = path.with_name(f".{path.name}.tmp")
    save_file(tensors, beside, metadata=metadata)
    os.chmod(beside, path.stat().st_mode & 0o777)
    os.replace(beside, path)


def _edit(path: Path, change: Any, value: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content, value)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_dtype(config: dict[str, Any], dtype: str) -> None:
    config["dtype"] = dtype
    for nested in config.values():
        if isinstance(nested, dict) and "dtype" in nested:
            nested["dtype"] = dtype


def _with_size(index: dict[str, Any], size: int) -> None:
    index.setdefault("metadata", {})["total_size"] = size
