"""Which files of a directory are the checkpoint.

A tokenizer class names its files itself (vocab.txt, spiece.model, tekken.json, ...), so there is no
list of those that count. There is one of those that transformers never reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from posttrain.engine.errors import ConfigError

TEMPLATES = "additional_chat_templates"
"""The one folder below a checkpoint that transformers reads."""

CARD = "*.md"
NEVER_READ = (
    # Words, pictures and logs.
    CARD, "license*", "licence*", "notice*", "use_policy*", "requirements*.txt", "*.pdf", "*.html",
    "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.mp4", "*.wav", "*.log", "*.out",
    "*.err", "*.tfevents.*", "*.sh", "*.yaml", "*.yml", "*.toml", "*.lock", "*.tmp", ".*",
    # Code, and what holds code.
    "*.py", "*.pyc", "*.ipynb", "*.pkl", "*.pickle",
    # Weights of other forms, and states of an optimiser.
    "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ot",
    "*.onnx", "*.onnx_data*", "*.tflite", "*.mlmodel", "*.npz", "*.npy",
    "consolidated*.safetensors",
    # What a trainer or a hub keeps beside a checkpoint.
    "trainer_state.json", "training_args.json", "*_results.json", "modelcard.json",
    "configuration.json", "latest",
    # Data, and records of posttrain.
    "*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.arrow", "*.zip", "*.gz", "*.tar", "history.json",
    "record.json", "best.json", "code.diff", "adapter_base.json",
)  # fmt: skip
"""Names that are no part of a checkpoint, in small letters."""

OTHER_FOLDERS = ("[!a]*/*", "a[!d]*/*", "a/*", "adapter*/*")
"""Globs of what lies in folders, but for `TEMPLATES`: a glob cannot say "all but one name"."""

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tiktoken.model", "tekken.json", "vocab.bpe", "*.tiktoken",
    "*.model", "tokenizer.model.*", "dict.txt", "prophetnet.tokenizer", "entity_vocab.json",
    "byte_maps.json",
)  # fmt: skip
"""Files of which one holds the tokens. A reward model has one too: it reads the same text."""


def is_model_file(name: str) -> bool:
    """Whether a file of this name, at the top of a checkpoint, is a part of it."""
    return not any(fnmatchcase(name.lower(), pattern) for pattern in NEVER_READ)


def vocabulary_files(names: Iterable[str]) -> list[str]:
    """Those of `names` that may hold the tokens of a tokenizer."""
    return [name for name in names if any(fnmatchcase(name, p) for p in VOCABULARIES)]


def model_files(directory: Path) -> list[str]:
    """The files of a checkpoint by their names relative to `directory`, sorted."""
    found = [p.name for p in directory.iterdir() if p.is_file() and is_model_file(p.name)]
    templates = directory / TEMPLATES
    if templates.is_dir():
        found += [f"{TEMPLATES}/{p.name}" for p in templates.glob("*.jinja") if p.is_file()]
    return sorted(found)


def check_links(directory: Path, files: Iterable[str], *, store: Path | None = None) -> None:
    """Refuse links to files that are not the checkpoint's: their text would be copied along.

    Links may stay inside `directory`, lead into `store`, and from a snapshot of a Hub cache to its
    blobs. Weights may lie anywhere: what is not made of tensors is refused anyway. What links from
    a store was looked at when it came into it. Raises ConfigError.
    """
    directory = directory.resolve()
    inside = [directory]
    if store is not None:
        if directory.is_relative_to(store.resolve()):
            return
        inside.append(store.resolve())
    if directory.parent.name == "snapshots":
        inside.append(directory.parent.parent / "blobs")
    for name in files:
        target = (directory / name).resolve()
        if name.endswith(".safetensors") or any(target.is_relative_to(d) for d in inside):
            continue
        raise ConfigError(
            f"{directory / name}: a link to {target}, outside of the checkpoint; what it points at "
            "would become a part of the model. If it is meant, put a copy in its place (cp -L)"
        )
