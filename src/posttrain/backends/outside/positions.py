"""How many tokens a model reads at once, by its config: a config.json, or transformers' object.

The context lengths of models with rotary positions are scaled in several ways, and config.json says
the length before or after that:

- `yarn`, `llama3`, `linear`: the greater of `max_position_embeddings` and factor times the
  original length (`original_max_position_embeddings`; without one `max_position_embeddings` is it,
  as transformers and vLLM have it).
- `dynamic`, `longrope`: the original length. Beyond it transformers turns *all* positions of a
  forward pass by other angles, by the longest row in it, so that a row's numbers would depend on
  its neighbours, and those of the sampler be others than those of the learner.
- Learned positions (GPT-2) have a row of a table each: `max_position_embeddings` is a hard limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT_CONFIGS = ("text_config", "decoder", "generator")
"""Where the settings of the text model stand in a config.json of several models."""

SCALED = ("yarn", "linear", "llama3")


def text_config(config: Any) -> Any:
    """The settings of the text model: those of a model that reads pictures, too, are nested."""
    if not isinstance(config, Mapping):
        return config.get_text_config(decoder=True)
    nested = (config.get(name) for name in TEXT_CONFIGS)
    return next((found for found in nested if isinstance(found, Mapping)), config)


def positions_of(config: Any) -> int | None:
    """How many tokens a model reads at once; None without a limit."""
    config = text_config(config)
    stated = _number(_get(config, "max_position_embeddings")) or _number(
        _get(config, "n_positions")
    )
    if stated is None:
        return None
    limits = [_scaled(rope, config, int(stated)) for rope in _ropes(config)]
    return min(limits, default=int(stated))


def _scaled(rope: Mapping[str, Any], config: Any, stated: int) -> int:
    kind = rope.get("rope_type", rope.get("type"))
    outside = _get(config, "original_max_position_embeddings")
    original = _number(outside) or _number(rope.get("original_max_position_embeddings"))
    factor = _number(rope.get("factor"))
    if kind in ("dynamic", "longrope", "su"):
        return min(int(original or stated), stated)
    if kind in SCALED and factor:
        return max(stated, int((original or stated) * factor))
    return stated


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The rotary settings: one, or one for each kind of layer.

    Those of several kinds of layers come from families whose `max_position_embeddings` is the
    length after scaling (Gemma 3), so that a factor without an original length says nothing there.
    """
    # Old files have the second name for the first.
    found = _get(config, "rope_parameters") or _get(config, "rope_scaling")
    if not isinstance(found, Mapping):
        return []
    nested = [rope for rope in found.values() if isinstance(rope, Mapping)]
    if not nested:
        return [found]
    told = "original_max_position_embeddings"
    return [r for r in nested if told in r or r.get("rope_type", r.get("type")) != "linear"]


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return float(value) if usable else None
