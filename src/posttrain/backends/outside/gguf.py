"""The head of a GGUF file, read without torch: what model it is, its tokens, types and shapes.

A file is the text `GGUF`, a version, the numbers of tensors and of entries, the entries (names to
numbers, texts and lists), a table of the tensors, and from the next multiple of the alignment on
their bytes (github.com/ggml-org/ggml, docs/gguf.md). Everything is little endian.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.backends.outside.headers import TensorHeader
from posttrain.engine.errors import ConfigError

ENDING = ".gguf"
NEEDS = ("gguf", "accelerate")
"""Packages that transformers reads such files with, of the extra `gguf`."""
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
           11: "<q", 12: "<d"}  # fmt: skip
"""Type of an entry to how its number is packed."""
TEXT, LIST = 8, 9
MOST = 100_000_000
"""Characters of a text, and elements of a list; those of published files have a hundredth."""
SPECIAL = (3, 4)
"""Types of tokens that text is not made of: those that control, and those that a user added."""
OTHER_NAMES = {
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
}  # fmt: skip
"""What llama.cpp calls a family to what transformers calls it."""
KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}
"""Entries of a family to their names in a config.json, as far as a plan asks for them."""


@dataclass(frozen=True, kw_only=True)
class GgufHead:
    """What a file says of itself."""

    path: Path
    entries: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
    """By the names that llama.cpp gives them; their shapes are as torch has them."""

    @property
    def family(self) -> str:
        """The `model_type` that transformers has for it."""
        named = str(self.entries["general.architecture"])
        return OTHER_NAMES.get(named, named)

    def config(self) -> dict[str, Any]:
        """What a plan reads of a config.json; the whole of it is made with the weights."""
        named = self.entries["general.architecture"]
        found = {
            ours: self.entries[f"{named}.{theirs}"]
            for theirs, ours in KEYS.items()
            if f"{named}.{theirs}" in self.entries
        }
        ids = {
            f"{name}_token_id": self.entries[f"tokenizer.ggml.{name}_token_id"]
            for name in ("bos", "eos")
            if f"tokenizer.ggml.{name}_token_id" in self.entries
        }
        tied = "output.weight" not in self.tensors
        sizes = {"vocab_size": len(self.tokens), "tie_word_embeddings": tied}
        return {"model_type": self.family} | found | ids | sizes

    @property
    def tokens(self) -> list[str]:
        """The tokens by their ids."""
        found = self.entries.get("tokenizer.ggml.tokens")
        return found if isinstance(found, list) else []

    def added(self) -> frozenset[str]:
        """Special tokens."""
        types = self.entries.get("tokenizer.ggml.token_type") or []
        pairs = zip(self.tokens, types, strict=False)
        return frozenset(token for token, kind in pairs if kind in SPECIAL)

    def tokenizer_config(self) -> dict[str, Any]:
        """The special tokens as texts."""
        ids = {
            name: self.entries.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))
        }
        known = range(len(self.tokens))
        return {name: self.tokens[i] for name, i in ids.items() if i in known}

    def license(self) -> dict[str, str]:
        """What the file says of its licence."""
        keys = {"license": "general.license", "license_name": "general.license.name",
                "license_link": "general.license.link"}  # fmt: skip
        found = {name: self.entries.get(key) for name, key in keys.items()}
        return {name: text for name, text in found.items() if isinstance(text, str) and text}

    @property
    def chat_template(self) -> str | None:
        """The template that the file has."""
        found = self.entries.get("tokenizer.chat_template")
        return found if isinstance(found, str) else None


def gguf_of(source: Path) -> Path | None:
    """The GGUF file that is meant by a file or a directory; None for any other checkpoint.

    Raises ConfigError for a directory with several and no other weights.
    """
    if source.is_file():
        return source if source.name.lower().endswith(ENDING) else None
    if not source.is_dir() or any(source.glob("*.safetensors")):
        return None
    found = sorted(path for path in source.iterdir() if path.name.lower().endswith(ENDING))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ConfigError(
            f"{source}: it has {len(found)} GGUF files ({names}); name one of them, as in "
            f"{found[0]}"
        )
    return found[0] if found else None


def read_head(path: Path) -> GgufHead:
    """The head of a file.

    Raises ConfigError for a file that is no GGUF file, of a version that transformers does not
    read, cut short, of a family that transformers cannot make of it, or without tokens.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise _broken(path, f"it has {size} bytes, fewer than a GGUF file begins with")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                head, ends = _parse(path, _Reader(content))
            except (struct.error, UnicodeDecodeError, IndexError, OverflowError) as error:
                raise _broken(path, f"its head cannot be read ({error})") from None
    if ends > size:
        raise _broken(path, f"it has {size} bytes and its head asks for {ends}: it was cut short")
    _check_family(head)
    if not head.tokens:
        raise ConfigError(
            f"{path}: it has no tokens (tokenizer.ggml.tokens); fetch a file with its tokenizer"
        )
    return head


def check_packages(path: Path) -> None:
    """Raise ConfigError where what transformers reads such files with is not installed."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{path}: reading a GGUF file needs {' and '.join(missing)}: "
            "pip install 'posttrain[gguf]'"
        )


@cache
def known_families() -> frozenset[str]:
    """The families that the installed transformers makes of GGUF files; empty where that cannot be
    told. Read from its source, since importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.origin:
        return frozenset()
    folder = Path(spec.origin).parent / "integrations"
    files = [folder / "ggml.py", folder / "gguf" / "gguf_config_mapping.py"]
    found: set[str] = set()
    for path in filter(Path.is_file, files):
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
                names = [t.id for t in statement.targets if isinstance(t, ast.Name)]
                if any("CONFIG" in name and "GGUF" in name for name in names):
                    keys = (k.value for k in statement.value.keys if isinstance(k, ast.Constant))
                    found |= {str(key) for key in keys}
    # Without it the package has another layout.
    return frozenset(found - {"general", "tokenizer"}) if "llama" in found else frozenset()


def _check_family(head: GgufHead) -> None:
    known = known_families()
    if known and head.family not in known:
        raise ConfigError(
            f"{head.path}: general.architecture is {head.family!r}, which the installed "
            f"transformers does not read from a GGUF file; it reads {', '.join(sorted(known))}. "
            "Name the safetensors checkpoint that the file was made from"
        )


class _Reader:
    """Numbers and texts, one after another."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, 0

    def number(self, form: str) -> Any:
        (found,) = struct.unpack_from(form, self.content, self.place)
        self.place += struct.calcsize(form)
        return found

    def text(self) -> str:
        length = self.number("<Q")
        if length > MOST or self.place + length > len(self.content):
            raise IndexError(f"a text of {length} bytes at byte {self.place}")
        self.place += length
        return self.content[self.place - length : self.place].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in FORMATS:
            return self.number(FORMATS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            raise IndexError(f"an entry of the unknown type {kind} at byte {self.place}")
        of, count = self.number("<I"), self.number("<Q")
        if count > MOST or of == LIST:
            raise IndexError(f"a list of {count} elements of type {of} at byte {self.place}")
        if of not in FORMATS:
            return [self.value(of) for _ in range(count)]
        form = f"<{count}{FORMATS[of][1]}"
        found = struct.unpack_from(form, self.content, self.place)
        self.place += struct.calcsize(form)
        return list(found)


def _parse(path: Path, reader: _Reader) -> tuple[GgufHead, int]:
    """The head, and how many bytes its tensors end after."""
    if reader.content[:4] != b"GGUF":
        raise _broken(path, f"it is not a GGUF file (it begins with {reader.content[:4]!r})")
    reader.place = 4
    version, count, num_entries = (reader.number(form) for form in ("<I", "<Q", "<Q"))
    if version not in (2, 3):
        raise ConfigError(
            f"{path}: GGUF version {version}; transformers reads versions 2 and 3. Make the file "
            "anew with a current llama.cpp"
        )
    entries: dict[str, Any] = {}
    for _ in range(num_entries):
        name = reader.text()
        entries[name] = reader.value(reader.number("<I"))
    if not isinstance(entries.get("general.architecture"), str):
        raise _broken(path, "it does not say of which family it is (general.architecture)")
    tensors, ends = {}, 0
    for _ in range(count):
        name, rank = reader.text(), reader.number("<I")
        if rank > 8:
            raise IndexError(f"a tensor of rank {rank}")
        shape = tuple(reader.number("<Q") for _ in range(rank))[::-1]
        kind, start = reader.number("<I"), reader.number("<Q")
        dtype, size = _type(kind, shape)
        tensors[name] = TensorHeader(file=path, dtype=dtype, shape=shape)
        ends = max(ends, start + size)
    alignment = max(1, int(entries.get("general.alignment", 32)))
    begins = -(-reader.place // alignment) * alignment
    return GgufHead(path=path, entries=entries, tensors=tensors), begins + ends


def _type(kind: int, shape: tuple[int, ...]) -> tuple[str, int]:
    """What a type of tensors is called, and how many bytes a tensor has, 0 where that is unknown:
    the package knows all kinds of blocks."""
    if importlib.util.find_spec("gguf") is None:
        return f"ggml {kind}", 0
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in set(GGMLQuantizationType):
        return f"ggml {kind}", 0
    named = GGMLQuantizationType(kind)
    elements, size = GGML_QUANT_SIZES[named]
    return named.name, math.prod(shape) // elements * size


def _broken(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path}: {what}; fetch the file again")
