"""How large a model is, by its config.json or by the settings that make it; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.backends.budget import BYTES, Shape, saved_bytes, shape_of
from posttrain.backends.outside.gguf import read_head
from posttrain.backends.outside.headers import FLOATS, num_parameters, read_headers
from posttrain.backends.outside.positions import text_config
from posttrain.engine.errors import ConfigError
from posttrain.engine.parsing import Unreadable, parse_json_file

QUERY_KEY_NORMS = ("qwen3", "qwen3_moe")
"""Families that normalise each head's queries and keys."""
ATTENTION_BIASES = ("qwen2", "qwen2_moe")
"""Families whose queries, keys and values have a bias that no field of config.json tells."""
PLAIN_GGUF = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of tensors in a GGUF file that are no blocks."""
TINY_BYTES = 16_000_000
"""Models below it compute on one thread (`stages/worker.py`)."""
TINY_VOCABULARY = 100
"""Tokens of a model that `pretrain` makes: five special ones and printable ASCII, see
`backends/tiny.py`; characters of other texts come on top."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a causal model."""

    shape: Shape
    """What decides about memory."""
    heads: int
    key_heads: int
    head_width: int
    dtype: str = "float32"
    """Type of the saved weights."""

    @property
    def parameters(self) -> int:
        """All numbers, frozen ones among them."""
        return self.shape.parameters

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return len(self.shape.layers)

    @property
    def layer_numbers(self) -> int:
        """Weights of one layer that a token is multiplied with."""
        attention = 2 * self.shape.hidden * (self.shape.queries + self.shape.keys)
        return attention + 3 * self.shape.hidden * self.shape.intermediate

    @property
    def bytes(self) -> int:
        """Size of the saved weights."""
        return saved_bytes(self.shape, self.dtype)

    @property
    def is_tiny(self) -> bool:
        """Whether one thread is enough for its products (`stages/worker.py`)."""
        return self.layers * self.layer_numbers * 4 < TINY_BYTES


def model_of_config(
    config: Mapping[str, Any], *, parameters: int | None = None, dtype: str | None = None
) -> Model | None:
    """The sizes of a model by the content of its config.json; None where that does not say them.

    The number of parameters is counted by the layers of Llama, Qwen 2 and Qwen 3 where it is not
    given.
    """
    said = text_config(config)
    try:
        shape = shape_of(config, parameters or 1)
    except ConfigError:
        return None
    heads = _whole(said, "num_attention_heads", "n_head")
    if not heads or not shape.vocabulary or not shape.intermediate:
        return None
    width = shape.queries // heads
    if parameters is None:
        parameters = _count(said, config, shape, width)
        shape = shape_of(config, parameters)
    return Model(
        shape=shape,
        heads=heads,
        key_heads=max(1, shape.keys // width),
        head_width=width,
        dtype=dtype or _dtype(config) or _dtype(said) or "float32",
    )


def _count(said: Mapping[str, Any], config: Mapping[str, Any], shape: Shape, width: int) -> int:
    """All numbers of a model: embeddings, layers and the last norm."""
    hidden, family = shape.hidden, said.get("model_type")
    attention = 2 * hidden * (shape.queries + shape.keys)
    if said.get("attention_bias"):
        attention += shape.queries + 2 * shape.keys + hidden
    elif family in ATTENTION_BIASES:
        attention += shape.queries + 2 * shape.keys
    norms = 2 * hidden + (2 * width if family in QUERY_KEY_NORMS else 0)
    experts = _whole(said, "num_experts", "n_routed_experts", "num_local_experts")
    inner = _whole(said, "moe_intermediate_size") or _whole(said, "intermediate_size")
    # Of experts all are there, whichever of them a token goes through; and what chooses.
    feed_forward = 3 * hidden * (inner * experts if experts else shape.intermediate)
    layer = attention + norms + feed_forward + hidden * experts
    tied = said.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    tables = shape.vocabulary * hidden * (1 if tied else 2)
    return tables + len(shape.layers) * layer + hidden


def model_of_directory(directory: Path) -> Model | None:
    """The sizes of a checkpoint: numbers and type by its weights. None for what is none, or does
    not say its sizes."""
    try:
        config = parse_json_file(directory / "config.json")
        tensors = read_headers(directory)
    except (OSError, Unreadable, ConfigError):
        return None
    types = [FLOATS.get(tensor.dtype, "float32") for tensor in tensors.values()]
    dtype = max(sorted(set(types)), key=types.count) if types else None
    return model_of_config(config, parameters=num_parameters(tensors), dtype=dtype)


def model_of_gguf(path: Path) -> Model | None:
    """The sizes of what a GGUF file becomes: blocks become bfloat16, plain numbers stay. None where
    the file does not say them."""
    try:
        head = read_head(path)
    except (OSError, ConfigError):
        return None
    numbers = num_parameters(head.tensors)
    types = {tensor.dtype for tensor in head.tensors.values() if len(tensor.shape) > 1}
    dtype = PLAIN_GGUF[types.pop()] if len(types) == 1 and types <= set(PLAIN_GGUF) else "bfloat16"
    return model_of_config(head.config(), parameters=numbers, dtype=dtype)


def model_of_pretrain(config: Mapping[str, Any]) -> Model:
    """The sizes of the Qwen3 model that the settings of a `pretrain` stage make."""
    thinks = bool(config.get("thinking") or config.get("modes"))
    made = model_of_config(
        {
            "model_type": "qwen3",
            "hidden_size": config["hidden_size"],
            "num_hidden_layers": config["num_layers"],
            "num_attention_heads": config["num_heads"],
            "head_dim": config["head_dim"],
            "intermediate_size": config["intermediate_size"],
            "vocab_size": TINY_VOCABULARY + 2 * thinks,
            "tie_word_embeddings": True,
        }
    )
    assert made is not None, "all sizes are given"
    return made


def _whole(config: Mapping[str, Any], *names: str) -> int:
    """The first of these entries that is a positive whole number, else 0."""
    found = (config.get(name) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)


def _dtype(config: Mapping[str, Any]) -> str | None:
    """The type that a config names; files of older versions have the second name for it."""
    said = config.get("dtype") or config.get("torch_dtype")
    return said if said in BYTES else None
