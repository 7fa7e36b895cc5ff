"""Checkpoints from outside: which files are the model, and what identifies them.

A source is a directory, the name under which `posttrain adopt` put one into the store, or a Hub id
(`owner/name`, optionally `owner/name@revision`). Its identity is the bytes of its files, so moving
the directory changes nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import files_digest

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True)
class External:
    """A checkpoint directory and its identity."""

    directory: Path
    files: tuple[str, ...]
    """Relative names, sorted."""
    sha256: str
    """One digest of all files."""


def find_external(source: str | Path) -> External:
    """The checkpoint named by `source`. Hashes its files; downloads a Hub id not in the cache.

    Raises ConfigError if there is none, or if it has no config or no safetensors weights.
    """
    directory = Path(source).expanduser()
    if not directory.is_dir():
        if not _HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
            raise ConfigError(
                f"model {str(source)!r}: no such directory; give a checkpoint directory, the name "
                "of an adopted checkpoint (see `posttrain ls`), or a Hub id such as "
                "Qwen/Qwen3-0.6B"
            )
        directory = _download(str(source))
    directory = directory.resolve()
    files = sorted(
        path.name
        for path in directory.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in MODEL_FILES)
    )
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise ConfigError(
            f"model {str(source)!r}: {directory} holds {', '.join(files) or 'no model files'}; a "
            "checkpoint needs config.json, *.safetensors and tokenizer files (convert .bin weights "
            "with save_pretrained(..., safe_serialization=True))"
        )
    return External(directory=directory, files=tuple(files), sha256=files_digest(directory, files))


def vocabulary(directory: Path) -> dict[str, int] | None:
    """Token to id, from tokenizer.json without loading a tokenizer; None if it has another form."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    tokens = content.get("model", {}).get("vocab")
    if not isinstance(tokens, dict):
        return None
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {**tokens, **added}


def _download(source: str) -> Path:
    # Only a Hub id needs it, and it takes a third of a second to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    name, _, revision = source.partition("@")
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(MODEL_FILES))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {source!r}: neither a directory nor to be had from the Hub "
            f"({str(error).splitlines()[0]}); check the id, the revision and the connection"
        ) from error
