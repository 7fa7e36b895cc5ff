"""Checkpoints from outside: which files are the model, and what identifies them.

A source is a directory, the name under which `posttrain adopt` put one into the store, a Hub id
(`owner/name` or `hub:owner/name`, optionally with `@revision`), or a GGUF file. Its identity is the
bytes of its files, so moving the directory changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.backends.outside.adapters import (
    base_of,
    check_fits,
    hash_without_place,
    is_adapter,
    read_adapter_config,
    read_adapter_headers,
    revision_of,
)
from posttrain.backends.outside.faults import (
    check_config,
    check_directory,
    check_pointers,
    check_tensors,
    check_tokenizer_files,
)
from posttrain.backends.outside.files import (
    TEMPLATES,
    check_links,
    model_files,
    vocabulary_files,
)
from posttrain.backends.outside.gguf import ENDING, check_packages, gguf_of, read_head
from posttrain.backends.outside.headers import TensorHeader, read_headers
from posttrain.backends.outside.hub import HUB_ID, download
from posttrain.backends.outside.positions import text_config
from posttrain.backends.template import finished_renderer
from posttrain.backends.turn_end import TurnEnd, turn_end
from posttrain.backends.vocabulary import difference
from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import file_digest, files_digest
from posttrain.engine.hashes import HashFile
from posttrain.engine.parsing import Unreadable, parse_json_file

LARGEST_CONFIG = 16 * 2**20
LARGEST = 2**30
"""Bytes of config.json and its like, and of tokenizer.json; those of published models have at most
a hundredth and a tenth of that."""


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
    added: frozenset[str]
    """The added tokens among them, such as special ones."""
    tokenizer_config: Mapping[str, Any]
    """Content of tokenizer_config.json; {} without one."""
    chat_template: tuple[str, str] | None
    """The file it stands in, and its text; None where there is none."""
    base: CheckpointSource | None = None
    """The model that an adapter stands on, where it is known; None for a whole model."""
    adapter: Mapping[str, Any] | None = None
    """Content of adapter_config.json; None for a whole model."""
    origin: Mapping[str, str]
    """Where it is from: `path`, or `hub` (the id), `commit` and the `revision` asked for; and the
    `license`, `license_name` and `license_link` that its README.md has. Of a GGUF file `path`,
    `gguf`, its sha256, and the licence that it names."""

    @property
    def gguf(self) -> Path | None:
        """The GGUF file that has to be converted before it can be used; None for other ones."""
        return self.directory / self.files[0] if "gguf" in self.origin else None

    def check_conversion(self) -> None:
        """Raise ConfigError where the packages that convert a GGUF file are not installed."""
        if self.gguf is not None:
            check_packages(self.gguf)


def find_checkpoint(
    source: str | Path,
    hash_file: HashFile = file_digest,
    *,
    store: Path | None = None,
    base: CheckpointSource | Literal["find", "later"] = "find",
) -> CheckpointSource:
    """The checkpoint named by `source`. Hashes its files; downloads a Hub id not in the cache.

    `hash_file` gives the sha256 of a file; that of a store need not read it again. Links in a
    directory below `store` were looked at when they came into it. `base` is what an adapter stands
    on: a checkpoint, the one that the adapter names, or one that is not there yet.

    Raises ConfigError if there is none, if it lacks a config, weights or a tokenizer, if it is
    another thing than a causal language model in plain numbers, if one of its files is broken, or
    if it links to files that are not the checkpoint's.
    """
    # With `hub:` in front it is a Hub id, whatever directories there are.
    on_hub, text = str(source).startswith("hub:"), str(source).removeprefix("hub:")
    directory = Path(text).expanduser()
    origin: dict[str, str] = {}
    gguf = None if on_hub else gguf_of(directory)
    if gguf is not None:
        return _of_gguf(gguf.resolve(), hash_file)
    if not on_hub and directory.is_file():
        raise ConfigError(
            f"model {str(source)!r}: a file; give the directory that it lies in, with config.json, "
            f"*.safetensors and the tokenizer's files, or a *{ENDING} file"
        )
    if on_hub or not directory.is_dir():
        if not HUB_ID.fullmatch(text) or text.startswith("."):
            raise ConfigError(
                f"model {str(source)!r}: no such directory or file; give a checkpoint directory, "
                f"the name of an adopted checkpoint (see `posttrain ls`), a *{ENDING} file, or a "
                "Hub id such as Qwen/Qwen3-0.6B"
            )
        directory = download(text)
        name, _, revision = text.partition("@")
        # The cache has a directory for each commit.
        origin = {"hub": name, "commit": directory.name}
        origin |= {"revision": revision} if revision else {}
    directory = directory.resolve()
    origin = (origin or {"path": str(directory)}) | _license(directory)
    check_directory(directory)
    files = model_files(directory)
    if is_adapter(directory):
        return _find_adapter(directory, files, origin, hash_file, store, base)
    lacking = [] if any(name.endswith(".safetensors") for name in files) else ["*.safetensors"]
    lacking += [] if "config.json" in files else ["config.json"]
    if lacking:
        raise ConfigError(
            f"model {str(source)!r}: {directory} has no {' and no '.join(lacking)}; it holds "
            f"{', '.join(files) or 'no model files'}. A checkpoint needs config.json, "
            "*.safetensors and tokenizer files: fetch it again, or save it with save_pretrained"
        )
    check_pointers(directory, files)
    check_links(directory, files, store=store)
    tokenizer_config = _read_json(directory / "tokenizer_config.json")
    check_tokenizer_files(str(source), directory, files, tokenizer_config)
    config = _read_json(directory / "config.json")
    check_config(directory / "config.json", config)
    tensors = read_headers(directory)
    check_tensors(directory, config, tensors)
    # Read before the weights are hashed, which takes a while.
    path = directory / "tokenizer.json"
    tokenizer = _read_json(path, LARGEST)
    return CheckpointSource(
        directory=directory,
        files=tuple(files),
        config=config,
        tensors=tensors,
        generation_config=_read_json(directory / "generation_config.json"),
        vocabulary=_vocabulary(path, tokenizer),
        added=frozenset(_added(path, tokenizer)),
        tokenizer_config=tokenizer_config,
        chat_template=_chat_template(directory),
        origin=origin,
        sha256=files_digest(directory, files, hash_file),
    )


def _of_gguf(path: Path, hash_file: HashFile) -> CheckpointSource:
    """What a GGUF file says of the checkpoint that it becomes."""
    check_pointers(path.parent, [path.name])
    head = read_head(path)
    sha256 = hash_file(path)
    template = head.chat_template
    return CheckpointSource(
        directory=path.parent,
        files=(path.name,),
        sha256=sha256,
        config=head.config(),
        tensors=head.tensors,
        generation_config={},
        vocabulary={token: number for number, token in enumerate(head.tokens)},
        added=head.added(),
        tokenizer_config=head.tokenizer_config(),
        chat_template=None if template is None else (path.name, template),
        origin={"path": str(path), "gguf": sha256} | head.license(),
    )


def _find_adapter(
    directory: Path,
    files: list[str],
    origin: Mapping[str, str],
    hash_file: HashFile,
    store: Path | None,
    base: CheckpointSource | Literal["find", "later"],
) -> CheckpointSource:
    """The adapter in a directory. What it does not bring itself is that of its base."""
    adapter, tensors = read_adapter_config(directory), read_adapter_headers(directory)
    check_pointers(directory, files)
    check_links(directory, files, store=store)
    if base == "find":
        place, revision = base_of(directory), revision_of(directory)
        named = str(place) if place.is_dir() or not revision else f"{place}@{revision}"
        base = find_checkpoint(named, hash_file, store=store)
    below = None if base == "later" else base
    # The tensors of a GGUF file have other names; its adapter is looked at when it is loaded.
    if below is not None and below.adapter is None and below.gguf is None:
        check_fits(directory, tensors, below.tensors)
    found = vocabulary_files(files)
    path = directory / "tokenizer.json"
    tokenizer = _read_json(path, LARGEST)
    if not found and below is not None:
        vocabulary, added = below.vocabulary, below.added
    else:
        vocabulary, added = _vocabulary(path, tokenizer), frozenset(_added(path, tokenizer))
    own = _read_json(directory / "tokenizer_config.json")
    template = _chat_template(directory)
    if template is None and not found and below is not None:
        template = below.chat_template
    return CheckpointSource(
        directory=directory,
        files=tuple(files),
        config={} if below is None else below.config,
        tensors=tensors,
        generation_config={} if below is None else below.generation_config,
        vocabulary=vocabulary,
        added=added,
        tokenizer_config=own if found or below is None else below.tokenizer_config,
        chat_template=template,
        base=below,
        adapter=adapter,
        origin=origin,
        sha256=files_digest(directory, files, hash_without_place(hash_file)),
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
    places = [f"in {source.directory / 'tokenizer.json'}" for source in (teacher, student)]
    return f"vocabulary ({len(theirs)} and {len(ours)} tokens; {found.said(*places)})"


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
        render=None if template is None else finished_renderer(template[1], special),
    )


def _rows(config: Mapping[str, Any]) -> int | None:
    rows = _of_text(config, "vocab_size")
    return rows if isinstance(rows, int) else None


def _of_text(config: Mapping[str, Any], key: str) -> Any:
    """An entry of the language model in a config, which some nest in that of a larger model."""
    nested = text_config(config)
    return (nested if key in nested else config).get(key)


def _token_text(token: Any) -> str | None:
    """A special token of tokenizer_config.json, which is a text or an object with one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _vocabulary(path: Path, tokenizer: Mapping[str, Any]) -> dict[str, int] | None:
    model = tokenizer.get("model")
    tokens = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(tokens, dict):
        return None
    found = {**tokens, **_added(path, tokenizer)}
    strange = next((t for t, i in found.items() if not isinstance(i, int)), None)
    if not found or strange is not None:
        what = "without tokens" if not found else f"whose token {strange!r} has no number as its id"
        raise ConfigError(f"{path}: a vocabulary {what}; fetch the file again")
    return found


def _added(path: Path, tokenizer: Mapping[str, Any]) -> dict[str, int]:
    try:
        return {str(t["content"]): t["id"] for t in tokenizer.get("added_tokens") or []}
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"{path}: added_tokens is no list of tokens with content and id; fetch the file again"
        ) from error


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
        return parse_json_file(path)
    except Unreadable as error:
        raise ConfigError(f"{path}: {error}; mend it or fetch the checkpoint again") from error
