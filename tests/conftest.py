"""One thread for every test and its child processes, and small models to test with.

The models here are a few thousand parameters: a second thread gains nothing, and on busy cores two
threads that wait for each other are ten times slower.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, LlamaConfig, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.tiny import character_tokenizer

torch.set_num_threads(1)


def _config(kind: str, vocabulary: int, positions: int) -> Any:
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_positions=positions,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "llama":
        # Grouped queries: four heads share one head of keys and values; the head is not tied.
        return LlamaConfig(num_key_value_heads=1, tie_word_embeddings=False, **shape)
    return Qwen3Config(num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **shape)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LanguageModel]:
    """`make(kind, ...)`: a random model of two layers whose distributions are far from uniform.

    `kind` is qwen3 (tied head, grouped queries), llama (own head, one key-value head) or gpt2
    (learned positions, dropout in training). `stop` are the stop token ids.
    """

    def make(
        kind: str = "qwen3",
        *,
        stop: int | list[int] | None = None,
        positions: int = 64,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> LanguageModel:
        tokenizer = character_tokenizer([])
        torch.manual_seed(seed)
        config = _config(kind, vocabulary or len(tokenizer), positions)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        ends = tokenizer.eos_token_id if stop is None else stop
        model.generation_config = GenerationConfig(
            eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
        return LanguageModel(model=model, tokenizer=tokenizer)

    return make
