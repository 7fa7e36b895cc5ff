"""What keeps a checkpoint from being used, told while planning: in words, with the file.

Everything here is cheap: names of files, small JSON files, headers of weights. What only a loaded
model shows is refused by `checkpoint.load`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.backends.outside.files import VOCABULARIES, is_model_file, vocabulary_files
from posttrain.backends.outside.headers import FLOATS, TensorHeader
from posttrain.backends.outside.positions import text_config
from posttrain.engine.errors import ConfigError

POINTER = b"version https://git-lfs."
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt")
ENCODERS = frozenset(
    {
        "albert", "bert", "camembert", "clip", "deberta", "deberta-v2", "distilbert", "electra",
        "ernie", "esm", "funnel", "longformer", "modernbert", "mpnet", "nomic_bert", "roberta",
        "siglip", "vit", "xlm-roberta",
    }
)  # fmt: skip
ENCODER_DECODERS = frozenset(
    {
        "bart", "blenderbot", "encoder-decoder", "led", "longt5", "m2m_100", "marian", "mbart",
        "mt5", "nllb-moe", "pegasus", "switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5",
        "whisper",
    }
)  # fmt: skip
ENCODER_HEADS = (
    "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
    "ForImageClassification", "ForNextSentencePrediction",
)  # fmt: skip
WITHOUT_FILES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
"""Tokenizers of bytes or code points, which need no vocabulary."""
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
NOT_TEXT = re.compile(r"vision|visual|image|audio|speech|encoder\.")


def check_directory(directory: Path) -> None:
    """Refuse a directory that is something else than a model's weights beside a config.json, and
    one of which a file is gone: without its chat template a model would be another one."""
    gone = [p for p in directory.iterdir() if is_model_file(p.name) and not p.exists()]
    if gone:
        first = min(gone)
        more = f" ({len(gone)} such links there)" if len(gone) > 1 else ""
        raise ConfigError(
            f"{first}: a link to {first.readlink()}, which does not exist{more}: the file was "
            "moved, or removed from a cache; fetch the checkpoint again"
        )
    if (directory / "model_index.json").is_file():
        raise ConfigError(
            f"{directory}/model_index.json: a diffusers pipeline, which makes images or sounds; "
            "name a causal language model"
        )
    config = directory / "config.json"
    tensors = any(directory.glob("*.safetensors"))
    if not tensors:
        other = [p.name for pattern in OTHER_WEIGHTS for p in sorted(directory.glob(pattern))]
        if other and config.is_file():
            raise ConfigError(
                f"{directory / other[0]}: weights in a form that can hold code, or of another "
                "framework, and there are no *.safetensors; convert them with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., "
                "safe_serialization=True)"
            )


def check_pointers(directory: Path, files: Iterable[str]) -> None:
    """Refuse a directory of which a file was not fetched, as by `git clone` without Git LFS."""
    for name in files:
        with (directory / name).open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise ConfigError(
                    f"{directory / name}: it is a Git LFS pointer, not the file itself; fetch the "
                    "file (git lfs pull)"
                )


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config.json (at `path`) of what is no causal language model in plain numbers."""
    kind = config.get("model_type")
    kind = kind if isinstance(kind, str) else None
    quantised = config.get("quantization_config") or config.get("compression_config")
    if isinstance(quantised, Mapping):
        method = quantised.get("quant_method") or "unnamed"
        raise ConfigError(
            f"{path}: quantization_config: its weights are quantised ({method}); posttrain trains "
            "and samples weights of 16 or 32 bits. Name the checkpoint it was made from"
        )
    if kind in ENCODER_DECODERS or config.get("is_encoder_decoder") is True:
        raise ConfigError(
            f"{path}: model_type {kind!r}: an encoder-decoder; posttrain trains causal language "
            "models, which read prompt and response as one row"
        )
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(
            f"{path}: architectures is {named!r}; it has to be a list of names of classes. Fetch "
            "the checkpoint again"
        )
    encodes = kind in ENCODERS or (bool(named) and all(n.endswith(ENCODER_HEADS) for n in named))
    if encodes and config.get("is_decoder") is not True:
        raise ConfigError(
            f"{path}: model_type {kind!r}{f' ({named[0]})' if named else ''}: an encoder, whose "
            "tokens see later ones, so that it writes no text; name a causal language model"
        )
    _check_known(path, config, kind)


def _check_known(path: Path, config: Mapping[str, Any], kind: str | None) -> None:
    """Refuse a family that the installed transformers has no code for."""
    if not kind:
        raise ConfigError(
            f"{path}: model_type is {config.get('model_type')!r}; it names the family of the "
            "model, such as 'qwen3'. Fetch the checkpoint again, or name a directory that "
            "save_pretrained wrote"
        )
    known = known_families()
    if not known or kind in known:
        return
    if isinstance(config.get("auto_map"), Mapping):
        modules = {str(n).split(".")[0].split("--")[-1] for n in config["auto_map"].values()}
        raise ConfigError(
            f"{path}: model_type {kind!r} is not one of transformers: it needs Python code of its "
            f"own (auto_map: {', '.join(sorted(f'{module}.py' for module in modules))}), and "
            "posttrain never runs code of a checkpoint. Choose a family that transformers has, or "
            "a newer version of it"
        )
    raise ConfigError(
        f"{path}: model_type {kind!r} is none that the installed transformers knows; install a "
        "version that does, or choose another model"
    )


@cache
def known_families() -> frozenset[str]:
    """The model types of the installed transformers; empty where that cannot be told.

    Read from its source, since importing it takes seconds.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.origin:
        return frozenset()
    folder = Path(spec.origin).parent / "models" / "auto"
    paths = [folder / "auto_mappings.py", folder / "configuration_auto.py"]
    found: set[str] = set()
    for path in paths:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            found |= set(re.findall(r'"([\w.-]+)"[,:] "\w+Config"', text))
    # Fewer than these is another layout of the package, not a package of few families.
    return frozenset(found) if {"llama", "gpt2", "qwen3"} <= found else frozenset()


def check_tensors(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]
) -> None:
    """Refuse weights of another model than config.json describes, or in types that do not learn."""
    if not tensors:
        raise ConfigError(
            f"{directory}: its weight files hold no tensors; fetch the checkpoint again"
        )
    text = text_config(config)
    path = directory / "config.json"
    _check_types(tensors)
    width = _size(text, "hidden_size", "n_embd", "d_model")
    rows = _size(text, "vocab_size")
    factored = any(_size(text, name) for name in ("word_embed_proj_dim", "embedding_size"))
    for name, tensor in tensors.items():
        if not EMBEDDING.search(name) or NOT_TEXT.search(name) or len(tensor.shape) != 2:
            continue
        expected = (rows or tensor.shape[0], (width if not factored else None) or tensor.shape[1])
        if tensor.shape != expected:
            raise ConfigError(
                f"{tensor.file}: {name} is {tensor.shape[0]} x {tensor.shape[1]}, and {path} asks "
                f"for {expected[0]} x {expected[1]} (vocab_size x hidden_size): the weights are "
                "those of another model. Take both files from one checkpoint"
            )
    found = [int(m[1]) for n in tensors if not NOT_TEXT.search(n) and (m := LAYER.search(n))]
    layers = _size(text, "num_hidden_layers", "n_layer")
    if found and layers and max(found) + 1 < layers:
        raise ConfigError(
            f"{directory}: its weights have {max(found) + 1} layers and {path} asks for {layers} "
            "(num_hidden_layers): the others would start at random. Complete the checkpoint, or "
            "mend config.json"
        )


def _check_types(tensors: Mapping[str, TensorHeader]) -> None:
    # Buffers may be of integers; matrices that learn are not.
    strange = {n: t for n, t in tensors.items() if t.dtype not in FLOATS and len(t.shape) > 1}
    if len(strange) * 2 > sum(len(tensor.shape) > 1 for tensor in tensors.values()):
        name, tensor = next(iter(strange.items()))
        raise ConfigError(
            f"{tensor.file}: {name} is of type {tensor.dtype}: the weights are quantised. Name the "
            "checkpoint they were made from, in bfloat16, float16 or float32"
        )


def _size(config: Mapping[str, Any], *names: str) -> int | None:
    found = (config.get(name) for name in names)
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool)), None)


def check_tokenizer_files(
    source: str, directory: Path, files: Sequence[str], tokenizer_config: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint without the tokens of a tokenizer. `source` is what the user named."""
    found = vocabulary_files(files)
    if not found and tokenizer_config.get("tokenizer_class") not in WITHOUT_FILES:
        raise ConfigError(
            f"model {source!r}: {directory} holds no tokenizer ({', '.join(files)}); copy the "
            f"tokenizer files of the model it was made from, {', '.join(VOCABULARIES[:3])} or "
            "whichever it has, beside the weights (tokenizer.save_pretrained)"
        )
    empty = [name for name in found if not (directory / name).stat().st_size]
    if empty and len(empty) == len(found):
        raise ConfigError(f"{directory / empty[0]}: an empty file; fetch the checkpoint again")
