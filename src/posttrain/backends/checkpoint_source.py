"""Checkpoints from outside: which files are the model, and what identifies them.

A source is a directory, the name under which `posttrain adopt` put one into the store, or a Hub id
(`owner/name`, optionally `owner/name@revision`). Its identity is the bytes of its files, so moving
the directory changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.backends.outside.faults import (
    check_config,
    check_directory,
    check_tensors,
    check_tokenizer_files,
)
from posttrain.backends.outside.files import (
    CARD,
    NEVER_READ,
    OTHER_FOLDERS,
    TEMPLATES,
    check_links,
    model_files,
)
from posttrain.backends.outside.headers import TensorHeader, read_headers
from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import file_digest, files_digest
from posttrain.engine.hashes import HashFile

LARGEST_CONFIG = 16 * 2**20
LARGEST = 2**30
"""Bytes of config.json and its like, and of tokenizer.json; those of published models have at most
a hundredth and a tenth of that."""

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
    tensors: Mapping[str, TensorHeader]
    """Types and shapes of the weights, by name."""
    generation_config: Mapping[str, Any]
    """Content of generation_config.json; {} without one."""
    vocabulary: Mapping[str, int] | None
    """Token to id; None where tokenizer.json is missing or of another form."""
    chat_template: tuple[str, str] | None
    """The file it stands in, and its text; None where there is none."""
    origin: Mapping[str, str]
    """Where it is from: `path`, or `hub` (the id), `commit` and the `revision` asked for; and the
    `license`, `license_name` and `license_link` that its README.md has."""


def find_checkpoint(
    source: str | Path, hash_file: HashFile = file_digest, *, store: Path | None = None
) -> CheckpointSource:
    """The checkpoint named by `source`. Hashes its files; downloads a Hub id not in the cache.

    `hash_file` gives the sha256 of a file; that of a store need not read it again. Links in a
    directory below `store` were looked at when they came into it.

    Raises ConfigError if there is none, if it lacks a config, weights or a tokenizer, if it is
    another thing than a causal language model in plain numbers, if one of its files is broken, or
    if it links to files that are not the checkpoint's.
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
    check_directory(directory)
    files = model_files(directory)
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise ConfigError(
            f"model {str(source)!r}: {directory} holds {', '.join(files) or 'no model files'}; a "
            "checkpoint needs config.json, *.safetensors and tokenizer files (convert .bin weights "
            "with save_pretrained(..., safe_serialization=True))"
        )
    check_links(directory, files, store=store)
    tokenizer_config = _read_json(directory / "tokenizer_config.json")
    check_tokenizer_files(str(source), directory, files, tokenizer_config)
    config = _read_json(directory / "config.json")
    check_config(directory / "config.json", config)
    tensors = read_headers(directory)
    check_tensors(directory, config, tensors)
    # Read before the weights are hashed, which takes a while.
    return CheckpointSource(
        directory=directory,
        files=tuple(files),
        config=config,
        tensors=tensors,
        generation_config=_read_json(directory / "generation_config.json"),
        vocabulary=_vocabulary(_read_json(directory / "tokenizer.json", LARGEST)),
        chat_template=_chat_template(directory),
        origin=origin,
        sha256=files_digest(directory, files, hash_file),
    )


def token_conflict(student: CheckpointSource, teacher: CheckpointSource) -> str | None:
    """Where two checkpoints differ in what tokens mean, with both values and files; None if not.

    Compared is what both have of vocabulary, output size, stop tokens and chat template, as
    `stages/teachers.py` compares the loaded models. This needs no weights, so a plan can tell.
    """
    ours, theirs = student.vocabulary, teacher.vocabulary
    if ours is not None and theirs is not None and ours != theirs:
        token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        return (
            f"vocabulary ({len(theirs)} and {len(ours)} tokens; token {token!r} has id "
            f"{theirs.get(token)} in {teacher.directory / 'tokenizer.json'} and "
            f"{ours.get(token)} in {student.directory / 'tokenizer.json'})"
        )
    facts: tuple[tuple[str, Callable[[CheckpointSource], tuple[str, Any] | None]], ...] = (
        ("vocab_size", _vocab_size),
        ("eos_token_id", _stop_ids),
        ("chat template", lambda external: external.chat_template),
    )
    for what, read in facts:
        mine, other = read(student), read(teacher)
        if mine is not None and other is not None and mine[1] != other[1]:
            value, counterpart = _excerpts(other[1], mine[1])
            return (
                f"{what} ({value} in {teacher.directory / other[0]} and "
                f"{counterpart} in {student.directory / mine[0]})"
            )
    return None


def _vocab_size(external: CheckpointSource) -> tuple[str, Any] | None:
    size = external.config.get("vocab_size")
    return None if size is None else ("config.json", size)


def _stop_ids(external: CheckpointSource) -> tuple[str, Any] | None:
    """Those that end a response: the generation config's, else the config's."""
    contents = (
        ("generation_config.json", external.generation_config),
        ("config.json", external.config),
    )
    for name, content in contents:
        found = content.get("eos_token_id")
        if found is not None:
            return name, sorted(found) if isinstance(found, list) else [found]
    return None


def _excerpts(one: Any, other: Any) -> tuple[str, str]:
    """Two values as texts; of long texts some characters from where they part."""
    if not isinstance(one, str) or not isinstance(other, str):
        return str(one), str(other)
    length = max(len(one), len(other))
    start = next(i for i in range(length) if one[i : i + 1] != other[i : i + 1])
    place = f" at character {start + 1}"
    return f"{one[start : start + 40]!r}{place}", f"{other[start : start + 40]!r}{place}"


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int] | None:
    model = tokenizer.get("model")
    tokens = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(tokens, dict):
        return None
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    return {**tokens, **added}


def _chat_template(directory: Path) -> tuple[str, str] | None:
    """transformers reads chat_template.jinja first, then tokenizer_config.json; of several
    templates the one that is called default."""
    files = ("chat_template.jinja", f"{TEMPLATES}/default.jinja")
    for path in (directory / name for name in files):
        if path.is_file():
            try:
                return str(path.relative_to(directory)), path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{path}: not a text in UTF-8 ({error}); fetch the checkpoint again"
                ) from error
    template = _read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
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


def _read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    if not path.is_file():
        return {}
    size = path.stat().st_size
    if size > largest:
        raise ConfigError(
            f"{path}: {size} bytes, where such a file has at most {largest}; fetch the checkpoint "
            "again"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ConfigError(
            f"{path}: nested too deep to be read; fetch the checkpoint again"
        ) from error
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
                # The card has the licence.
                ignore_patterns=[p for p in (*NEVER_READ, *OTHER_FOLDERS) if p != CARD],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {source!r}: neither a directory nor to be had from the Hub "
            f"({str(error).splitlines()[0]}); check the id, the revision and the connection"
        ) from error
