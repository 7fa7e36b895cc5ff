"""How many tokens a model reads: by config.json and by transformers' object the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from posttrain.backends.architecture import has_full_attention
from posttrain.backends.outside.positions import positions_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "plain": ({"max_position_embeddings": 64}, 64),
    # Qwen 2.5: the length before scaling, and the original one beside the factor.
    "yarn": ({"max_position_embeddings": 64, "rope_parameters": YARN}, 256),
    "yarn, old name": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        256,
    ),
    # DeepSeek V3 and gpt-oss: the length after scaling.
    "yarn, after": ({"max_position_embeddings": 256, "rope_parameters": YARN}, 256),
    # Qwen 3: something in between.
    "yarn, between": ({"max_position_embeddings": 80, "rope_parameters": YARN}, 256),
    "linear": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}},
        128,
    ),
    "llama3": (
        {
            "model_type": "llama",
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        512,
    ),
    # By the longest row of a pass all angles change: what is right for one row alone ends there.
    "dynamic": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        64,
    ),
    "longrope": (
        {
            "model_type": "phi3",
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [2.0] * 4,
                "short_factor": [1.0] * 4,
            },
            "hidden_size": 16,
            "num_attention_heads": 2,
            "pad_token_id": 0,
        },
        64,
    ),
    "learned": ({"model_type": "gpt2", "n_positions": 48}, 48),
    "nested": (
        {"model_type": "gemma3", "text_config": {"max_position_embeddings": 96}},
        96,
    ),
    "per kind of layer": (
        {
            "model_type": "gemma3_text",
            "max_position_embeddings": 96,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        96,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_positions_follow_from_the_config(case: str) -> None:
    content, expected = CASES[case]
    content = {"model_type": "qwen2"} | content
    assert positions_of(content) == expected
    kind = content["model_type"]
    read = json.loads(json.dumps({k: v for k, v in content.items() if k != "model_type"}))
    assert positions_of(CONFIG_MAPPING[kind](**read)) == expected


@pytest.mark.parametrize("strange", ["many", -1, True, None, [64]])
def test_a_number_that_is_none_is_no_limit(strange: object) -> None:
    assert positions_of({"max_position_embeddings": strange}) is None


def test_a_window_counts_where_scaled_positions_outgrow_it() -> None:
    config = CONFIG_MAPPING["mistral"](sliding_window=64, max_position_embeddings=64)
    assert has_full_attention(config)
    config = CONFIG_MAPPING["mistral"](
        sliding_window=64, max_position_embeddings=64, rope_parameters=YARN | {"rope_theta": 1e4}
    )
    assert not has_full_attention(config)
    nested = CONFIG_MAPPING["gemma3"](text_config={"sliding_window": 8})
    assert not has_full_attention(nested)
