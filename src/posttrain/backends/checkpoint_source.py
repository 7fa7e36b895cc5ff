"""Checkpoints from outside: which files are the model, and what identifies them.

A source is a directory, the name under which `posttrain adopt` put one into the store, or a Hub id
(`owner/name`, optionally `owner/name@revision`). Its identity is the bytes of its files, so moving
the directory changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from posttrain.backends.turn_end import TurnEnd, template_renderer, turn_end
from posttrain.backends.vocabulary import difference
from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import file_digest, files_digest
from posttrain.engine.hashes import HashFile

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

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of which one holds the vocabulary. A reward model has one too: it reads the same text."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """A checkpoint directory and its identity."""

    directory: Path
    files: tuple[str, ...]
    """Relative names, sorted."""
    sha256: str
    """One digest of all files."""
    config: Mapping[str, Any]
    """Content of config.json."""
    generation_config: Mapping[str, Any]
    """Content of generation_config.json; {} without one."""
    vocabulary: Mapping[str, int] | None
    """Token to id; None where tokenizer.json is missing or of another form."""
    added: frozenset[str]
    """The added tokens among them, such as special ones."""
    tokenizer_config: Mapping[str, Any]
    """Content of tokenizer_config.json; {} without one."""
    chat_template: tuple[str, str] | None
    """The file it stands in, and its text; None where there is none."""
    origin: Mapping[str, str]
    """Where it is from: `path`, or `hub` (the id), `commit` and the `revision` asked for; and the
    `license`, `license_name` and `license_link` that its README.md has."""


def find_checkpoint(source: str | Path, hash_file: HashFile = file_digest) -> CheckpointSource:
    """The checkpoint named by `source`. Hashes its files; downloads a Hub id not in the cache.

    `hash_file` gives the sha256 of a file; that of a store need not read it again.

    Raises ConfigError if there is none, if it has no config or no safetensors weights, or if one of
    its JSON files is broken.
    """
    directory = Path(source).expanduser()
    origin: dict[str, str] = {}
    if not directory.is_dir():
        if not _HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
            raise ConfigError(
                f"model {str(source)!r}: no such directory; give a checkpoint directory, the name "
                "of an adopted checkpoint (see `posttrain ls`), or a Hub id such as "
                "Qwen/Qwen3-0.6B"
            )
        directory = _download(str(source))
        name, _, revision = str(source).partition("@")
        # The cache has a directory for each commit.
        origin = {"hub": name, "commit": directory.name}
        origin |= {"revision": revision} if revision else {}
    directory = directory.resolve()
    origin = (origin or {"path": str(directory)}) | _license(directory)
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
    if not any(name in files for name in TOKENIZERS):
        raise ConfigError(
            f"model {str(source)!r}: {directory} holds no tokenizer ({', '.join(files)}); copy the "
            f"tokenizer files of the model it was made from, {', '.join(TOKENIZERS)} or whichever "
            "it has, beside the weights (tokenizer.save_pretrained)"
        )
    # Read before the weights are hashed, which takes a while.
    tokenizer = _read_json(directory / "tokenizer.json")
    return CheckpointSource(
        directory=directory,
        files=tuple(files),
        config=_read_json(directory / "config.json"),
        generation_config=_read_json(directory / "generation_config.json"),
        vocabulary=_vocabulary(tokenizer),
        added=frozenset(_added(tokenizer)),
        tokenizer_config=_read_json(directory / "tokenizer_config.json"),
        chat_template=_chat_template(directory),
        origin=origin,
        sha256=files_digest(directory, files, hash_file),
    )


def token_conflict(student: CheckpointSource, teacher: CheckpointSource) -> str | None:
    """Where two checkpoints differ in what tokens mean, with both values and files; None if not.

    This needs no weights, so a plan can tell; `vocabulary.check_same_tokens` compares the loaded
    models in the same way.
    """
    ours, theirs = student.vocabulary, teacher.vocabulary
    if ours is None or theirs is None:
        return None
    found = difference(ours, theirs, our_added=student.added, their_added=teacher.added)
    if found is None:
        return None
    return (
        f"vocabulary ({len(theirs)} and {len(ours)} tokens; token {found.token!r} has id "
        f"{found.theirs} in {teacher.directory / 'tokenizer.json'} and "
        f"{found.ours} in {student.directory / 'tokenizer.json'})"
    )


def ends_of(source: CheckpointSource) -> TurnEnd | None:
    """What ends a turn, by the files of a checkpoint; None where they cannot be read without
    transformers."""
    if source.vocabulary is None:
        return None
    rows, known = _rows(source.config), set(source.vocabulary.values())
    special = {
        name: text
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := _token_text(source.tokenizer_config.get(name))) is not None
    }
    eos, template = special.get("eos_token"), source.chat_template
    added = {token: source.vocabulary[token] for token in source.added}
    if eos is not None and eos in source.vocabulary:
        added[eos] = source.vocabulary[eos]
    return turn_end(
        eos=None if eos is None else source.vocabulary.get(eos),
        generation=source.generation_config.get("eos_token_id"),
        config=_of_text(source.config, "eos_token_id"),
        added=added,
        usable=lambda token: token in known and (rows is None or token < rows),
        render=None if template is None else template_renderer(template[1], **special),
    )


def _rows(config: Mapping[str, Any]) -> int | None:
    rows = _of_text(config, "vocab_size")
    return rows if isinstance(rows, int) else None


def _of_text(config: Mapping[str, Any], key: str) -> Any:
    """An entry of the language model in a config, which some nest in that of a larger model."""
    nested = config.get("text_config")
    return (nested if isinstance(nested, dict) and key in nested else config).get(key)


def _token_text(token: Any) -> str | None:
    """A special token of tokenizer_config.json, which is a text or an object with one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int] | None:
    model = tokenizer.get("model")
    tokens = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(tokens, dict):
        return None
    return {**tokens, **_added(tokenizer)}


def _added(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}


def _chat_template(directory: Path) -> tuple[str, str] | None:
    """transformers reads chat_template.jinja first, then tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.name, path.read_text(encoding="utf-8")
    template = _read_json(directory / "tokenizer_config.json").get("chat_template")
    return ("tokenizer_config.json", template) if isinstance(template, str) else None


def _license(directory: Path) -> dict[str, str]:
    """What the head of README.md says of the licence; {} where it says nothing."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    head = re.match(r"---\r?\n(.*?)^---", text, re.DOTALL | re.MULTILINE)
    # Plain texts on one line are what the Hub has there.
    lines = re.findall(
        r"^(license(?:_name|_link)?):[ \t]*(\S.*?)\s*$", head[1] if head else "", re.M
    )
    return {name: value.strip("'\"") for name, value in lines if value[0] not in "[{|>&*"}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path}: not JSON ({error}); mend it or fetch the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds a {type(content).__name__} where an object is needed; fetch the "
            "checkpoint again"
        )
    return content


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
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[*MODEL_FILES, "README.md"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {source!r}: neither a directory nor to be had from the Hub "
            f"({str(error).splitlines()[0]}); check the id, the revision and the connection"
        ) from error
