"""What a model's layers keep between tokens, and so by which path it is sampled and read.

`packed` models keep keys and values of all tokens in every layer: short rows may share a row of a
forward pass, and where there is a decoder for it (`cpu/fused.py`) every row of a cache may have its
own length. All others are `plain`: one row to a row, padded on the right, and all rows of a cache
at one length (`lockstep.py`). That is right for any causal model, and the only way for sliding
windows, convolutions and recurrent states.

Legend: B rows, T positions, D hidden.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from posttrain.backends.outside.positions import positions_of, text_config
from posttrain.engine.errors import ConfigError

Path = Literal["packed", "plain"]

# Checked one by one: packed rows gave what each row alone gives. Others may well do, but
# what a model makes of position ids and of a block mask cannot be read off its config: some ignore
# them without an error. Where a config has windows or recurrent layers the list does not count.
PACKABLE = frozenset(
    {
        "afmoe", "apertus", "arcee", "aria_text", "bitnet", "cohere", "cohere2",
        "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "ernie4_5",
        "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma3_text", "glm",
        "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "granite",
        "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe",
        "internlm3", "jetmoe", "llama", "ministral", "ministral3", "minimax_m2", "mistral",
        "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3",
        "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
        "solar_open", "stablelm", "starcoder2",
    }
)  # fmt: skip

SEES_LATER = "lets a token see later ones"
PROBE_LENGTH = 12
"""Tokens of the short row that is read in several ways; the long one is twice as long."""


def path_of(model: Any) -> Path:
    """By which path this transformers model is sampled and read.

    Follows from its config alone, so that it costs nothing to ask for each batch.
    """
    config = model.config
    # Eager attention adds a mask to the scores: one of True and False would not hide anything.
    listed = config.model_type in PACKABLE and config._attn_implementation == "sdpa"
    return "packed" if listed and has_full_attention(config) else "plain"


def has_full_attention(config: Any) -> bool:
    """Whether, by its config, every layer attends to all earlier positions.

    A window that no row can outgrow counts as full attention.
    """
    config, positions = text_config(config), positions_of(config)
    window = getattr(config, "sliding_window", None)
    slides = window is not None and (positions is None or window < positions)
    if getattr(config, "attention_chunk_size", None) is not None:
        return False
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if not kinds:
        # Mistral and its like: one window for all layers, and no list of layers.
        return not slides
    harmless = {"full_attention", "global"} | (set() if slides else {"sliding_attention"})
    return not set(kinds) - harmless


def backbone(model: Any) -> Any:
    """The part of a causal LM below its output projection."""
    # Llama 4 names a prefix that its text model does not have, and is its own base model then.
    return model.model if model.base_model is model else model.base_model


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode, and afterwards back into the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class CachedRows:
    """Rows of one length with their state in transformers' cache, read a few tokens at a time."""

    def __init__(self, model: Any) -> None:
        self.body, self.device = backbone(model), model.get_output_embeddings().weight.device
        self.cache = DynamicCache(config=text_config(model.config))
        accepted = inspect.signature(self.body.forward).parameters
        self.argument = cache_argument(accepted)
        # Given to all that take them, as `generate` does: without, Bamba counts from 0 again.
        self.takes_positions = "position_ids" in accepted
        self.length = 0

    def read(self, tokens_BT: Tensor) -> Tensor:
        """`hidden_BTD` of the next tokens, whose states join the cache."""
        rows, count = tokens_BT.shape
        inputs: dict[str, Any] = {self.argument: self.cache, "use_cache": True}
        if self.takes_positions:
            position_T = torch.arange(self.length, self.length + count, device=self.device)
            inputs["position_ids"] = position_T.expand(rows, count)
        self.length += count
        return self.body(input_ids=tokens_BT.to(self.device), **inputs).last_hidden_state

    def select(self, index_B: Tensor) -> None:
        """Make row i what row `index_B[i]` was; a row may be taken many times, or never.

        `reorder_cache` is beam search's, and the only one of the cache's methods on rows that
        layers with a recurrent state have as well.
        """
        self.cache.reorder_cache(index_B.to(self.device))


def cache_argument(accepted: Iterable[str]) -> str:
    """The name under which a model with these arguments takes its cache; Mamba has its own."""
    return "cache_params" if "cache_params" in accepted else "past_key_values"


def check_plain(model: Any, name: str) -> None:
    """Refuse a model that the plain path would compute wrongly; see `docs/suites.md`.

    Reads one short row in several ways that must agree. `name` stands in the error. Raises
    ConfigError for an encoder-decoder, a model without a transformers cache, bounds that hold for
    whole rows only, logits that are not a linear map of the last hidden state, layers that see
    later tokens, and a cache with which the hidden states are others than without.
    """
    body = backbone(model)
    accepted = inspect.signature(body.forward).parameters
    reason = None
    if model.config.is_encoder_decoder:
        reason = "is an encoder-decoder"
    elif body is model or "input_ids" not in accepted:
        reason = "has no decoder of its own below the output layer"
    elif getattr(text_config(model.config), "index_topk", None) is not None:
        reason = "attends to keys that an index picks, which may be others in a padded row"
    elif any(_bounds_steps(module) for module in model.modules()):
        reason = "bounds the step sizes of its recurrence for a whole row but not token by token"
    elif cache_argument(accepted) not in accepted or not model._supports_default_dynamic_cache():
        reason = "does not keep its state in a transformers cache"
    else:
        try:
            with evaluating(model), torch.inference_mode():
                reason = _disagreement(model, body)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            lines = str(error).splitlines() or [""]
            reason = f"fails in transformers on a short row ({type(error).__name__}: {lines[0]})"
    if reason is not None:
        raise ConfigError(
            f"{name}: the model ({model.config.model_type}) {reason}; posttrain would compute "
            "wrong numbers with it. Choose another model, or another version of transformers "
            "(docs/suites.md names the families that are tested)"
        )


def _bounds_steps(module: Any) -> bool:
    """Whether a Mamba 2 layer has bounds on its step size, as Zamba 2 does by default.

    transformers' own scan applies them and its single step does not.
    """
    low, high = getattr(module, "time_step_limit", None) or (0.0, math.inf)
    return low > 0 or high < math.inf


def _disagreement(model: Any, body: Any) -> str | None:
    """How two ways to read a row differ, or None."""
    head = model.get_output_embeddings()
    row_1T = _probe(head.weight)
    short_1T = row_1T[:, :PROBE_LENGTH]
    hidden_1TD = body(input_ids=short_1T, use_cache=False).last_hidden_state
    logits = model(input_ids=short_1T, use_cache=False).logits
    if hidden_1TD.shape[-1] != head.weight.shape[1] or not _close(
        torch.nn.functional.linear(hidden_1TD, head.weight, getattr(head, "bias", None)), logits
    ):
        return "changes its logits around the output projection"
    if not is_causal(model, head.weight):
        return SEES_LATER
    longer_1TD = body(input_ids=row_1T, use_cache=False).last_hidden_state
    if not _close(_stepwise(model, row_1T), longer_1TD):
        return "gives other hidden states with its transformers cache than without"
    return None


@torch.inference_mode()
def is_causal(model: Any, weight_VD: Tensor) -> bool:
    """Whether what follows a short row leaves its hidden states as they are, to rounding.

    `weight_VD` is the model's output layer or its embedding: it has a row for each id.
    """
    body, row_1T = backbone(model), _probe(weight_VD)
    short_1TD, longer_1TD = (
        body(input_ids=tokens_1T, use_cache=False).last_hidden_state[:, :PROBE_LENGTH]
        for tokens_1T in (row_1T[:, :PROBE_LENGTH], row_1T)
    )
    return _close(longer_1TD, short_1TD)


def _probe(weight_VD: Tensor) -> Tensor:
    """`row_1T`, a row of small ids, which every model has."""
    row_T = torch.arange(2 * PROBE_LENGTH, device=weight_VD.device) * 7 % 31 + 3
    return (row_T % len(weight_VD))[None]


def _stepwise(model: Any, row_1T: Tensor) -> Tensor:
    """Hidden states of a row: half of it at once, the rest token by token on a repeated cache."""
    rows = CachedRows(model)
    parts = [rows.read(row_1T[:, :PROBE_LENGTH])]
    # Copied and thinned out, as a group and its ended rows do it to a cache.
    rows.select(torch.zeros(3, dtype=torch.int64))
    for position in range(PROBE_LENGTH, row_1T.shape[1]):
        if position == PROBE_LENGTH + 2:
            rows.select(torch.tensor([2, 0]))
        count = 3 if position < PROBE_LENGTH + 2 else 2
        parts.append(rows.read(row_1T[:, position : position + 1].expand(count, 1))[:1])
    return torch.cat(parts, dim=1)


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal to the rounding of the type, seen against the largest number."""
    tolerance = 1e-3 if one.dtype in (torch.float32, torch.float64) else 5e-2
    scale = max(1.0, float(other.abs().max()))
    return bool((one - other).abs().max() <= tolerance * scale)
