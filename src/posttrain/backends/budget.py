"""What a stage takes of memory, part by part, worked out from a config.json and without torch.

The same numbers say how many tokens a forward pass may have, what `plan --estimate` tells before a
run, and what the message says of a stage that found no memory.

A part is there all the time (weights, moments), or in one phase of a step: while responses are
sampled, rows are read, or gradients are computed. Phases follow one another, so the most that a
stage takes is what is always there and the largest phase (`peak`).

What one layer keeps for the backward pass was counted in the layers of `cpu/flat.py` (norms,
products, attention, gated feed-forward). Models with other layers are near it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from posttrain.backends.outside.headers import read_headers
from posttrain.backends.outside.positions import text_config
from posttrain.engine.errors import ConfigError

MAX_TOKENS = 2048
"""Tokens of a forward pass: enough for matrix products at full speed, and few enough that what one
layer writes is still in the processor's cache when the next one reads it."""
MIN_TOKENS = 256
"""Passes of fewer tokens multiply so slowly that memory is better saved elsewhere."""
WORTH_KEEPING = 512
"""Fewer tokens than this in a pass cost more time than computing the layers' insides again."""

PROCESS = 450 * 2**20
"""What a stage's process takes with its libraries, before it has a model."""
LOGITS_BYTES = 24
"""For each token of the vocabulary while one is drawn: logits and log-probabilities in float32,
probabilities and their sums in float64."""
GROWING = 1.5
"""While a cache grows to its double both stand in memory."""
LOSS_TOKENS = 256
"""Tokens whose logits a loss has at once in float32, twice as many in a type of half the size
(`losses/projection.py`)."""
KEPT_ELEMENTS = 2**25
"""Up to so many tokens times vocabulary a loss keeps its softmax, twice as many in a type of half
the size (`losses/ops.py`)."""
MAX_COPIED, MAX_COPIED_BFLOAT16 = 2**24, 2**28
"""Elements up to which the output layer is laid out anew for each call of a sampler. In bfloat16 a
step takes less than half the time for it, and the copy has half the bytes."""
INT8_STATE = 1 + 4 / 256
"""BYTES of a moment in 8 bits: the number, and the scale of its block of 256."""

Phase = Literal["always", "sampling", "reading", "learning"]
CONFIG = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "layer_types", "sliding_window"),
    *("num_experts", "n_routed_experts", "num_local_experts", "moe_intermediate_size"),
    *("num_experts_per_tok", "model_type"),
)
"""Entries of a config that `shape_of` reads, by their usual names."""
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a model decides how much memory it takes."""

    parameters: int
    vocabulary: int
    hidden: int
    layers: tuple[str, ...]
    """The kind of each layer, such as "full_attention"."""
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together; values have the same."""
    intermediate: int
    """Width of the feed-forward layers that one token goes through."""
    window: int | None = None
    """Positions that a layer of kind "sliding_attention" keeps."""
    normed_heads: bool = False
    """Whether queries and keys are normalised by head, as in Qwen3."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that takes memory."""

    what: str
    """In words, such as "activations of 2,048 tokens"."""
    bytes: int
    phase: Phase = "always"


def shape_of(config: Mapping[str, Any], parameters: int | None = None) -> Shape:
    """The shape of a model by the content of its config.json.

    The number of `parameters` is worked out where it is not given, for layers like those of Llama.
    Raises ConfigError for a config without a hidden size or layers.
    """
    config = text_config(config)
    hidden = _whole(config, "hidden_size", "n_embd", "d_model")
    count = _whole(config, "num_hidden_layers", "n_layer", "num_layers")
    if not hidden or not count:
        raise ConfigError(
            "config.json: it names no hidden_size or no num_hidden_layers, so what the model takes "
            "of memory cannot be worked out; complete it"
        )
    heads = _whole(config, "num_attention_heads", "n_head") or 1
    width = _whole(config, "head_dim") or hidden // heads
    keys = (_whole(config, "num_key_value_heads") or heads) * width
    vocabulary = _whole(config, "vocab_size")
    inner = _whole(config, "intermediate_size", "n_inner") or 4 * hidden
    experts = _whole(config, "num_experts", "n_routed_experts", "num_local_experts")
    each = _whole(config, "moe_intermediate_size") or inner
    read = each * (_whole(config, "num_experts_per_tok") or 1) if experts else inner
    kinds = config.get("layer_types")
    kinds = tuple(map(str, kinds)) if isinstance(kinds, list | tuple) else ()
    if parameters is None:
        feed_forward = 3 * hidden * (each * experts if experts else inner)
        layer = 2 * hidden * (heads * width + keys) + feed_forward + 2 * hidden
        tables = 1 if config.get("tie_word_embeddings", True) else 2
        parameters = tables * vocabulary * hidden + count * layer + hidden
    return Shape(
        parameters=parameters,
        vocabulary=vocabulary,
        hidden=hidden,
        layers=kinds or ("full_attention",) * count,
        queries=heads * width,
        keys=keys,
        intermediate=read,
        window=_whole(config, "sliding_window") or None,
        normed_heads=str(config.get("model_type", "")).startswith(("qwen3", "gemma3", "olmo2")),
    )


def read_shape(directory: Path) -> Shape:
    """The shape of a checkpoint. Raises ConfigError for files that cannot be read."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}/config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{directory}/config.json is no JSON object; fetch the checkpoint again")
    tensors = read_headers(directory).values()
    return shape_of(config, sum(prod(tensor.shape) for tensor in tensors))


def _whole(config: Mapping[str, Any], *names: str) -> int:
    """The first of these entries that is a positive whole number, else 0."""
    found = (config.get(name) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)


# -- what one thing takes --------------------------------------------------------------------------


def cache_bytes(shape: Shape, tokens: int, precision: str = "float32") -> int:
    """Keys and values of a row of so many tokens. Recurrent states do not grow with a row and are
    left out."""
    lengths = {
        "full_attention": tokens,
        "sliding_attention": min(shape.window or tokens, tokens),
    }
    positions = sum(lengths.get(kind, 0) for kind in shape.layers)
    return 2 * positions * shape.keys * BYTES[precision]


def row_bytes(shape: Shape, tokens: int, precision: str = "float32") -> float:
    """What one row takes while it is sampled up to so many tokens."""
    return GROWING * cache_bytes(shape, tokens, precision) + LOGITS_BYTES * shape.vocabulary


def laid_out_bytes(shape: Shape, precision: str = "float32") -> int:
    """The weights of the layers once more, joined where they read the same input, as they are while
    responses are sampled (`cpu/fused.py`), and an output layer that is not too large. In float32
    there are two forms of them (`cpu/product.py`)."""
    head = shape.vocabulary * shape.hidden
    most = MAX_COPIED_BFLOAT16 if precision == "bfloat16" else MAX_COPIED
    copied = max(0, shape.parameters - head) + (head if head <= most else 0)
    return (2 if precision == "float32" else 1) * copied * BYTES[precision]


def layer_bytes(shape: Shape, precision: str = "float32") -> int:
    """What one layer keeps of one token for its backward pass."""
    size = BYTES[precision]
    # Each norm keeps its input and the normed numbers, in float32 where these are narrower, and
    # the products behind it keep what it gives.
    norm = 3 * shape.hidden * 4 if size == 4 else shape.hidden * (4 + 2 * size)
    # Queries, keys and values as attention reads them, what it gives, and that in order of tokens.
    attention = 5 * shape.queries * size
    if shape.normed_heads:
        attention += (shape.queries + shape.keys) * (2 * size if size == 4 else 4 + size)
    # The gate before and after its activation, its partner, and their product.
    return 2 * norm + attention + 4 * shape.intermediate * size


def token_bytes(shape: Shape, precision: str = "float32", *, checkpointing: bool = False) -> int:
    """Activations of one token of a forward pass that is to be differentiated.

    With `checkpointing` a layer keeps what goes into it, and the insides of one layer at a time are
    computed again.
    """
    layer = layer_bytes(shape, precision)
    if not checkpointing:
        return len(shape.layers) * layer
    return len(shape.layers) * shape.hidden * BYTES[precision] + 2 * layer


def loss_bytes(shape: Shape, precision: str = "float32", *, tokens: int = MAX_TOKENS) -> int:
    """What the output layer takes in a loss: the logits of a chunk, a kept softmax where it is
    small, and the gradient of the head and of the embedding."""
    chunk = 2 * LOSS_TOKENS * shape.vocabulary * 4
    size, kept = BYTES[precision], tokens * shape.vocabulary
    kept = size * kept if kept <= KEPT_ELEMENTS * max(1, 4 // size) else 0
    return chunk + kept + 2 * shape.vocabulary * shape.hidden * size


# -- the parts of a stage --------------------------------------------------------------------------


def learner_parts(
    shape: Shape,
    *,
    precision: str = "float32",
    master: str = "float32",
    states: str = "float32",
    ema: bool = False,
    trained: int | None = None,
    adapter: bool = False,
    tokens: int = MAX_TOKENS,
    checkpointing: bool = False,
) -> tuple[Part, ...]:
    """A model that learns.

    `precision` is what it computes in, `master` and `states` are those of its optimiser; `trained`
    is how many numbers learn, all without one: only these have moments and gradients. With
    `adapter` they are those of an adapter, and the weights below it are there once, in the type
    that computes. `tokens` are those of its largest forward pass.
    """
    size, all_of_it = BYTES[precision], shape.parameters
    learning = all_of_it if trained is None else trained
    whole = master == "float32"
    kind = "float32" if whole else precision
    parts = []
    if adapter:
        parts.append(Part(what=f"frozen weights in {precision}", bytes=all_of_it * size))
        all_of_it = learning
    parts.append(Part(what=f"weights that learn in {kind}", bytes=all_of_it * BYTES[kind]))
    if whole and size < 4:
        parts.append(Part(what=f"their copy in {precision}", bytes=all_of_it * size))
    moment = {"float32": 4.0, "int8": INT8_STATE}[states]
    parts.append(
        Part(what=f"optimiser moments in {states}", bytes=int(2 * learning * moment)),
    )
    if ema:
        parts.append(Part(what="moving average", bytes=learning * 4))
    per_token = token_bytes(shape, precision, checkpointing=checkpointing)
    how = " with gradient checkpointing" if checkpointing else ""
    return (
        *parts,
        Part(what="gradients in float32", bytes=learning * 4, phase="learning"),
        Part(
            what=f"activations of {tokens:,} tokens{how}",
            bytes=tokens * per_token,
            phase="learning",
        ),
        Part(
            what=f"logits of {LOSS_TOKENS} tokens and the gradient of the output layer",
            bytes=loss_bytes(shape, precision, tokens=tokens),
            phase="learning",
        ),
    )


def reader_parts(
    shape: Shape,
    *,
    what: str = "model that is read",
    precision: str = "float32",
    tokens: int = MAX_TOKENS,
    own_weights: bool = True,
) -> tuple[Part, ...]:
    """A model that rows are read with: a teacher, a reference, a reward model. Without
    `own_weights` it is the one that learns."""
    size = BYTES[precision]
    # While it reads, a layer's insides are there once, and nothing is kept.
    reading = 2 * tokens * layer_bytes(shape, precision) + loss_bytes(shape, precision, tokens=0)
    parts = [Part(what=f"one pass of the {what}", bytes=reading, phase="reading")]
    if own_weights:
        parts.insert(0, Part(what=f"weights of the {what}", bytes=shape.parameters * size))
    return tuple(parts)


def sampler_parts(
    shape: Shape,
    *,
    precision: str = "float32",
    rows: int,
    length: int,
    own_weights: bool = True,
) -> tuple[Part, ...]:
    """A model that responses are drawn from, `rows` at a time of at most `length` tokens, prompt
    and response. Without `own_weights` it is the one that learns."""
    cache = int(rows * GROWING * cache_bytes(shape, length, precision))
    logits = rows * LOGITS_BYTES * shape.vocabulary
    parts = [
        Part(
            what="weights laid out for sampling",
            bytes=laid_out_bytes(shape, precision),
            phase="sampling",
        ),
        Part(what=f"keys and values of {rows:,} rows", bytes=cache, phase="sampling"),
        Part(what=f"logits of {rows:,} rows", bytes=logits, phase="sampling"),
    ]
    if own_weights:
        size = shape.parameters * BYTES[precision]
        parts.insert(0, Part(what="weights of the sampler", bytes=size))
    return tuple(parts)


def peak(parts: Iterable[Part], *, process: int = PROCESS) -> int:
    """The most bytes that a stage with these parts takes at once: its process, what is always there
    and the largest of its phases."""
    sums: dict[str, int] = dict.fromkeys(("always", "sampling", "reading", "learning"), 0)
    for part in parts:
        sums[part.phase] += part.bytes
    return process + sums.pop("always") + max(sums.values())


# -- what fits -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """How a learner goes through a batch."""

    max_tokens: int = MAX_TOKENS
    """Tokens of a forward pass; a longer row has a pass of its own."""
    kept_tokens: int | None = None
    """Passes of more tokens than these are computed with gradient checkpointing; None: no pass."""

    def checkpoints(self, tokens: int) -> bool:
        """Whether a pass of so many tokens is computed with gradient checkpointing."""
        return self.kept_tokens is not None and tokens > self.kept_tokens


def plan_passes(
    shape: Shape,
    memory: int,
    taken: Sequence[Part],
    *,
    precision: str = "float32",
    max_tokens: int = MAX_TOKENS,
) -> PassPlan:
    """How a learner fits into `memory` bytes, of which `taken` are parts: its own, of which
    activations do not count, and those of other models of the stage.

    As many tokens at once as fit, `max_tokens` at most. Where fewer than `WORTH_KEEPING` would, the
    insides of layers are computed again, which takes a third more time and lets ten times as many
    tokens fit. Never fewer than `MIN_TOKENS`: what does not fit then ends with an error that says
    so.
    """
    left = max(0, memory - peak(part for part in taken if _stays(part)))
    kept = left // token_bytes(shape, precision)
    if kept >= min(WORTH_KEEPING, max_tokens):
        return PassPlan(max_tokens=min(kept, max_tokens), kept_tokens=kept)
    again = left // token_bytes(shape, precision, checkpointing=True)
    return PassPlan(max_tokens=min(max(again, MIN_TOKENS), max_tokens), kept_tokens=kept)


def _stays(part: Part) -> bool:
    """Whether a part is there in a learner's pass whatever its tokens."""
    if part.phase == "learning":
        return not part.what.startswith("activations")
    return part.phase == "always"


# -- on the disk -----------------------------------------------------------------------------------


def saved_bytes(shape: Shape, save_dtype: str = "bfloat16") -> int:
    """A checkpoint on the disk, with weights of this type."""
    return shape.parameters * BYTES[save_dtype]


def step_checkpoint_bytes(parts: Iterable[Part]) -> int:
    """A step checkpoint on the disk, of a learner with these parts; the older one stays beside it
    until the newer is whole."""
    kept = [part for part in parts if part.phase == "always" and "copy" not in part.what]
    return sum(part.bytes for part in kept)
